"""log-probabilities: of the model's own distribution, before temperature, penalties and bias

Shapes: T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

AT_ONCE = 512
"""Positions of a prompt that are scored in one pass: their logits are T x V."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A token and how probable it was; the first of a text has nothing to be judged by."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens at its place, with theirs, best first."""


def scored(token: int, logits_V: Tensor, top: int) -> Scored:
    """Judge a token by the logits of its place."""
    return _judge(torch.tensor([token]), logits_V[None], top)[0]


def _judge(ids_T: Tensor, logits_TV: Tensor, top: int) -> list[Scored]:
    logprobs_TV = logits_TV.float().log_softmax(-1).cpu()
    chosen = logprobs_TV.gather(1, ids_T.cpu()[:, None])[:, 0].tolist()
    best = logprobs_TV.topk(min(top, logprobs_TV.shape[1]), dim=-1)
    rows = zip(ids_T.tolist(), chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Scored(token=token, logprob=logprob, top=tuple(zip(tokens, values, strict=True)))
        for token, logprob, tokens, values in rows
    ]


@torch.inference_mode()
def score_text(model: PreTrainedModel, ids: Sequence[int], top: int) -> list[Scored]:
    """Judge every token of a text by what stands before it, a stretch at a time."""
    found = [Scored(token=ids[0])]
    known, ids_T = None, torch.tensor(ids, device=model.device)
    stretches = len(ids) - 1 > AT_ONCE
    for start in range(0, len(ids) - 1, AT_ONCE):
        last = min(start + AT_ONCE, len(ids) - 1)
        out = model(ids_T[None, start:last], cache=known, use_cache=stretches)
        known = out.cache
        found += _judge(ids_T[start + 1 : last + 1], out.logits[0], top)
    return found
