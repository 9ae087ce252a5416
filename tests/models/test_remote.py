"""Generation with the trunk elsewhere is `generate` of the whole model, token for token."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from models import Cut
from models.parts import split_unchecked
from models.remote import join_remote
from models.tiny import roughen, tiny_config
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits

FAMILIES = ("gpt2", "llama", "qwen2", "gemma2", "gemma3_text", "mistral")
"""The last three have windows of 4 positions, shorter than the texts."""
CUTS = (Cut(1, 1), Cut(0, 0), Cut(2, 1))
FEW: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def whole(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(family)
    return roughen(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def remote(model: PreTrainedModel, cut: Cut = CUTS[0], **limits: Any) -> PreTrainedModel:
    parts = split_unchecked(model, cut)
    engine = GenerationEngine(parts.trunk, Limits(**limits))
    joined = join_remote(parts.bottom, parts.top, LocalTrunk(engine))
    joined.engine = engine
    return joined


def prompt(rows: int = 1, tokens: int = 9, pads: int = 0) -> dict[str, Tensor]:
    """Ids (B, T) and mask; the first row has `pads` positions of padding on its left."""
    ids_BT = torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :pads] = 0
    return {"input_ids": ids_BT.masked_fill(mask_BT == 0, 0), "attention_mask": mask_BT}


def repeated() -> dict[str, Tensor]:
    """A prompt in which look-up finds something."""
    ids_BT = prompt(tokens=6)["input_ids"].repeat(1, 3)
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}


MODES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "greedy": (prompt(), {"do_sample": False}),
    "padded": (prompt(3, pads=4), {"do_sample": False}),
    "beams": (prompt(2, pads=3), {"do_sample": False, "num_beams": 3}),
    "look-up": (repeated(), {"do_sample": False, "prompt_lookup_num_tokens": 3}),
    "sampled": (prompt(2, pads=2), {"do_sample": True, "top_p": 0.9, "temperature": 0.8}),
    "several": (prompt(), {"do_sample": True, "num_return_sequences": 3, "top_k": 20}),
    "controlled": (
        prompt(),
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_generate_is_the_whole_models(family: str, mode: str) -> None:
    model, (inputs, how) = whole(family), MODES[mode]
    split = remote(model, CUTS[FAMILIES.index(family) % len(CUTS)])
    answers = []
    for one in (model, split):
        torch.manual_seed(7)
        answers.append(one.generate(**inputs, **how, **FEW))
    assert torch.equal(*answers)
    assert split.engine.sessions == 0, "a cache that is gone leaves its session"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_whole_models(family: str) -> None:
    model, inputs = whole(family), prompt(2, pads=3)
    split, real = remote(model), inputs["attention_mask"].bool()

    want, got = model(**inputs).logits, split(**inputs).logits

    assert torch.allclose(got[real], want[real], atol=1e-5)
    assert split.engine.sessions == 0


def test_a_prompt_goes_in_pieces() -> None:
    model = whole("gemma2")
    split = remote(model, tokens=4)

    want = model.generate(**prompt(tokens=11), do_sample=False, **FEW)

    assert torch.equal(split.generate(**prompt(tokens=11), do_sample=False, **FEW), want)
    assert split.tally.trips == 3 + 11


def test_each_token_crosses_once() -> None:
    split = remote(whole("llama"))
    split.generate(**prompt(tokens=9), do_sample=False, **FEW)
    assert split.tally.positions == 9 + FEW["max_new_tokens"] - 1


def test_a_context_that_is_kept_keeps_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams are opened in the middle of a forward, and gRPC keeps the context it finds there."""
    split, kept = remote(whole("llama")), []
    opened = split.engine.open

    def keeping(name: str, **how: Any) -> Any:
        kept.append(contextvars.copy_context())
        return opened(name, **how)

    monkeypatch.setattr(split.engine, "open", keeping)
    split.generate(**prompt(), do_sample=False, **FEW)
    assert len(kept) == 1
    assert split.engine.sessions == 0


def test_set_back_costs_only_the_new_tokens() -> None:
    model = whole("llama")
    split, cache = remote(model), DynamicCache(config=model.config)
    ids_BT = prompt(tokens=12)["input_ids"]
    split(ids_BT, cache=cache)
    edited_BT = torch.cat([ids_BT[:, :7], ids_BT[:, :3]], 1)
    before = split.tally.copy()

    cache.crop(-5)
    got = split(edited_BT[:, 7:], cache=cache).logits

    assert (split.tally - before).positions == 3
    assert torch.allclose(got, model(edited_BT).logits[:, 7:], atol=1e-5)


def test_a_copied_cache_goes_on_by_itself() -> None:
    model = whole("llama")
    split, cache = remote(model), DynamicCache(config=model.config)
    ids_BT = prompt(tokens=12)["input_ids"]
    split(ids_BT[:, :8], cache=cache)
    other = copy.deepcopy(cache)

    split(ids_BT[:, 8:10], cache=cache)
    got = split(ids_BT[:, 3:6], cache=other).logits
    on = split(ids_BT[:, 10:], cache=cache).logits

    forked_BT = torch.cat([ids_BT[:, :8], ids_BT[:, 3:6]], 1)
    assert torch.allclose(got, model(forked_BT).logits[:, 8:], atol=1e-5)
    assert torch.allclose(on, model(ids_BT).logits[:, 10:], atol=1e-5)


def test_a_draft_model_helps_and_changes_nothing() -> None:
    model, inputs = whole("llama"), prompt(tokens=9)
    split = remote(model)
    want = model.generate(**inputs, do_sample=False, **FEW)

    got = split.generate(**inputs, do_sample=False, assistant_model=model, **FEW)

    assert torch.equal(got, want)
    assert split.tally.trips < FEW["max_new_tokens"], "the model itself guesses rightly"


def test_what_cannot_be_is_refused_in_words() -> None:
    model = whole("llama")
    split, ids_BT = remote(model), prompt()["input_ids"]
    with pytest.raises(ValueError, match="cache_implementation"):
        split(ids_BT, cache=StaticCache(config=model.config, max_cache_len=32))
    with torch.enable_grad(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        split(ids_BT)
    cache = DynamicCache(config=model.config)
    split(ids_BT, cache=cache)
    with pytest.raises(ValueError, match="attention_mask must be"):
        split(ids_BT, attention_mask=torch.ones_like(ids_BT), cache=cache)
    cache = DynamicCache(config=model.config)
    split(ids_BT, cache=cache)
    masked_BT = torch.ones(1, 18, dtype=torch.long)
    masked_BT[0, 2] = 0
    with pytest.raises(ValueError, match="another one for cached positions"):
        split(ids_BT, attention_mask=masked_BT, cache=cache)
    parts, others = split_unchecked(model, Cut(1, 1)), split_unchecked(model, Cut(2, 1))
    with pytest.raises(ValueError, match="of one cut"):
        join_remote(parts.bottom, others.top, LocalTrunk(split.engine))


def test_a_cache_that_an_error_left_half_done_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bottom has the token, the trunk has not: what would come next is wrong without a sign."""
    split, ids_BT = remote(whole("llama")), prompt()["input_ids"]
    cache = DynamicCache(config=split.config)
    split(ids_BT, cache=cache)

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(cache.graft_held.session, "forward", lost)
        with pytest.raises(RuntimeError, match="lost"):
            split(ids_BT[:, :1], cache=cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="left half done"):
            split(ids_BT[:, :1], cache=cache)


def test_a_cache_is_of_one_model() -> None:
    model = whole("llama")
    split, other, ids_BT = remote(model), remote(model), prompt()["input_ids"]
    cache, unsplit = DynamicCache(config=model.config), DynamicCache(config=model.config)
    split(ids_BT, cache=cache)
    with pytest.raises(ValueError, match="another model's"):
        other(ids_BT, cache=cache)
    split(ids_BT, cache=cache)
    model(ids_BT, cache=unsplit)
    with pytest.raises(ValueError, match="begun by another model"):
        split(ids_BT, cache=unsplit)
