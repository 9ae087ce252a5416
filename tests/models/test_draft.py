"""A draft of a client's ends and a bridge: what is said is what the model says by itself.

Here the model is whole: that a split one is the same is tested where it is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import Cut, split
from models.bridge import Bridge
from models.draft import make_draft, refuse_assisting
from models.tiny import WINDOW
from tests.models.helpers import ids, tiny

FAMILIES = ["gpt2", "llama", "qwen2", "gemma2", "gemma3_text", "mistral"]
NEW = 24
TEXT = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def drafting(model: PreTrainedModel, noise: float = 0.1, tokens: int = 5) -> PreTrainedModel:
    """A draft of the model whose bridge is better or worse."""
    parts = split(model, Cut(bottom=1, top=1))
    bridge = Bridge(parts.bottom.hidden_size, 16, seed=1)
    with torch.no_grad():
        bridge.down.normal_(std=noise, generator=torch.Generator().manual_seed(2))
    return make_draft(parts.bottom, parts.top, bridge, tokens=tokens)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """The new positions of each forward of the model."""
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def say(model: PreTrainedModel, prompt_BT: Tensor, **how: Any) -> Tensor:
    mask_BT = torch.ones_like(prompt_BT)
    return model.generate(prompt_BT, attention_mask=mask_BT, **{**TEXT, **how})


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_models_own_token_for_token(family: str) -> None:
    model, prompt_BT = tiny(family), ids(3, batch=1, tokens=3 * WINDOW)
    own = say(model, prompt_BT)
    for speculation in (
        {"assistant_model": drafting(model)},
        {"assistant_model": drafting(model, noise=1.0, tokens=2)},
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 3},
    ):
        with counted(model) as seen:
            text = say(model, prompt_BT, **speculation)
        assert torch.equal(text, own)
        assert max(seen[1:]) > 1  # several positions were checked at once


def test_a_good_guess_saves_trips() -> None:
    """A trunk that does next to nothing is guessed by a bridge that does nothing."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers[1:-1]:
            block.self_attn.o_proj.weight.mul_(1e-4)
            block.mlp.down_proj.weight.mul_(1e-4)
    draft = drafting(model, noise=0.0)
    with counted(model) as seen:
        text = say(model, ids(3, batch=1), assistant_model=draft)
    assert torch.equal(text, say(model, ids(3, batch=1)))
    assert len(seen) <= NEW / 4


def test_a_padding_token_within_the_text_is_a_token() -> None:
    model, prompt_BT = tiny("llama"), ids(3, batch=1)
    prompt_BT[0, 4] = TEXT["pad_token_id"]
    draft = drafting(model)
    masks: list[Any] = []
    draft.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    assert torch.equal(say(model, prompt_BT, assistant_model=draft), say(model, prompt_BT))
    assert all(mask is None or bool(mask.all()) for mask in masks)


def test_a_state_that_cannot_be_set_back_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="mamba keeps a recurrent state.*--speculate off"):
        refuse_assisting(tiny("mamba"))
