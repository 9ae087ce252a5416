"""What an unsplit model says, computed plainly: what answers are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulations.talk.speaker import Speaker

PROMPT = "Two make a"


def logprobs_of(speaker: Speaker, ids: Sequence[int]) -> Tensor:
    """Return the log-softmax after each token, in one pass."""
    with torch.inference_mode():
        return speaker.model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)


def encoded(text: str) -> list[int]:
    """Return the tokens of a text: a byte each."""
    return [byte + 3 for byte in text.encode()]


def greedy(speaker: Speaker, text: str, count: int) -> list[int]:
    """Return the likeliest tokens after a text, without a cache."""
    ids = encoded(text)
    for _ in range(count):
        ids.append(int(logprobs_of(speaker, ids)[-1].argmax()))
    return ids[-count:]
