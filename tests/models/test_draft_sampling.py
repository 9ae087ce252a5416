"""Speculation keeps the distribution of what is sampled; a wrong rule of acceptance does not.

The model here looks at nothing but the last token, so that each token of a long text is a draw from
one of a few known distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import utils

from models import Cut, split
from models.bridge import Bridge
from models.draft import make_draft
from tests.models.helpers import tiny

VOCAB, NEW = 5, 300


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def forgetful() -> PreTrainedModel:
    """A model whose next token depends on the last one alone."""
    model = tiny(
        "llama",
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.mul_(4.0)
        model.lm_head.weight.mul_(3.0)
    return model


def draft_of(model: PreTrainedModel) -> PreTrainedModel:
    parts = split(model, Cut(bottom=1, top=1))
    bridge = Bridge(parts.bottom.hidden_size, 16, seed=1)
    with torch.no_grad():
        bridge.down.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return make_draft(parts.bottom, parts.top, bridge, tokens=3)


def chances(model: PreTrainedModel, temperature: float) -> Tensor:
    """(V, V): what follows each token."""
    with torch.no_grad():
        logits_VV = model(torch.arange(VOCAB)[:, None]).logits[:, 0]
    return (logits_VV / temperature).softmax(-1)


def surprise(model: PreTrainedModel, temperature: float = 1.0, new: int = NEW, **how: Any) -> float:
    """Pearson's chi-square of what follows what, by its degrees of freedom, in deviations."""
    torch.manual_seed(0)
    text = model.generate(
        torch.tensor([[1]]),
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=new,
        **how,
    )[0]
    counts_VV = torch.zeros(VOCAB, VOCAB)
    counts_VV.index_put_((text[:-1], text[1:]), torch.ones(new), accumulate=True)
    due_VV = chances(model, temperature) * counts_VV.sum(-1, keepdim=True)
    seen = due_VV >= 5
    square = float((((counts_VV - due_VV) ** 2) / due_VV.clamp(min=1e-9))[seen].sum())
    degrees = int(seen.sum()) - VOCAB
    return (square - degrees) / (2 * degrees) ** 0.5


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("temperature", "new"), [(1.0, NEW), pytest.param(1.6, 5 * NEW, marks=SLOW)]
)
def test_what_is_sampled_keeps_its_distribution(temperature: float, new: int) -> None:
    model = forgetful()
    far = (chances(model, temperature) - chances(draft_of(model), temperature)).abs().sum(-1) / 2
    assert float(far.max()) > 0.2  # the draft is another model: there is something to reject
    assert surprise(model, temperature, new, assistant_model=draft_of(model)) < 4
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}
    assert surprise(model, temperature, new, **lookup) < 4


def accept_all(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Believe the draft."""

    def wrong(ids: Tensor, logits: Tensor, length: int, own: Tensor, **how: Any) -> Any:
        kept, last = ids[:, -length:], own[:, length].softmax(-1)
        return torch.cat([kept, torch.multinomial(last, 1)], -1), torch.tensor(length)

    return wrong


def draw_anew(rule: Callable[..., Any]) -> Callable[..., Any]:
    """After a rejection, draw from the model's distribution, and not from what the draft lacks."""

    def wrong(ids: Tensor, logits: Tensor, length: int, own: Tensor, **how: Any) -> Any:
        tokens, matches = rule(ids, logits, length, own, **how)
        tokens[:, -1:] = torch.multinomial(own[:, matches].softmax(-1), 1)
        return tokens, matches

    return wrong


@pytest.mark.parametrize(
    ("wrong", "new"), [(accept_all, NEW), pytest.param(draw_anew, 5 * NEW, marks=SLOW)]
)
def test_a_wrong_rule_is_noticed(wrong: Any, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = forgetful()
    monkeypatch.setattr(utils, "_speculative_sampling", wrong(utils._speculative_sampling))
    assert surprise(model, new=new, assistant_model=draft_of(model)) > 8
