"""How long texts and their prompts are, from masks and from where dL/dh2 begins.

Positions of which no label counts have no gradient at the head's input, for which dL/dh2 is solved
(`labels`). At h2 they have one, for the top's attention looks back at them, but a shorter one.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flower_app.data.client import IGNORED, Batch
from simulations.audit.attack import Attack, NotApplicable, Score, Scores
from simulations.audit.attacks.labels import head_gradients
from simulations.audit.observation import (
    EXACT,
    PUBLIC,
    STALE,
    START,
    Crossed,
    Knowledge,
    Observation,
    Truth,
)

TINY = 1e-6
"""Of the longest gradient: what is shorter is none."""


class Lengths(Attack):
    """Lengths, to the token."""

    name = "lengths"
    reads = ("masks", "dL/dh2")
    levels: ClassVar[tuple[str, ...]] = (EXACT, STALE, START, PUBLIC)
    ends = ("top",)
    metric = "length"

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`."""
        whole: list[tuple[int, int]] = []
        prompts: list[tuple[int, int]] = []
        for crossed, batch in zip(observation.crossed, truth.batches, strict=True):
            length_B = _lengths(crossed)
            whole += zip(length_B, batch.attention_mask.sum(1).tolist(), strict=True)
            if crossed.grad_h2_BTD is not None:
                guess_B = _begins(_norms(crossed, knowledge), length_B)
                both = zip(guess_B, _prompts(batch), strict=True)
                prompts += [(guess, prompt) for guess, prompt in both if prompt]
        scores = {self.metric: _score(whole)}
        return {**scores, "prompt length": _score(prompts)} if prompts else scores

    def shuffled(self, truth: Truth, rng: np.random.Generator) -> Truth:
        """Texts of other lengths, each as likely."""
        return replace(truth, batches=[_resized(batch, rng) for batch in truth.batches])


def _lengths(crossed: Crossed) -> list[int]:
    """What the masks say."""
    if crossed.mask_BT is not None:
        return crossed.mask_BT.sum(1).int().tolist()
    if crossed.h1_BTD is None:
        raise NotApplicable("nothing crossed")
    return [crossed.h1_BTD.shape[1]] * len(crossed.h1_BTD)


def _norms(crossed: Crossed, knowledge: Knowledge) -> Tensor:
    """How long the gradient of each position is (B, T): at the head, or without a top at h2."""
    assert crossed.grad_h2_BTD is not None
    if knowledge.level == PUBLIC:
        return crossed.grad_h2_BTD.norm(dim=-1)
    there = crossed.to(knowledge.device)
    return head_gradients(knowledge.ends(crossed)[1], there).norm(dim=-1).cpu()


def _begins(norms_BT: Tensor, length_B: Sequence[int]) -> list[int]:
    """The first position of each text that is learned; the one before it predicts it."""
    both = zip(norms_BT, length_B, strict=True)
    return [1 + _jump(norms_T[: length - 1]) for norms_T, length in both]


def _jump(norms_T: Tensor) -> int:
    """Where gradients become longer for good: the two levels that fit their logarithms best."""
    logs_T = norms_T.double().clamp_min(TINY * float(norms_T.max()) + 1e-30).log()
    parts = ((logs_T[:at], logs_T[at:]) for at in range(1, len(logs_T)))
    errors = [sum(float((part - part.mean()).square().sum()) for part in both) for both in parts]
    return 1 + int(np.argmin(errors)) if errors else 0


def _prompts(batch: Batch) -> list[int]:
    """How many tokens come before the first that is learned; 0: none."""
    return [int((row_T != IGNORED).int().argmax()) for row_T in batch.labels]


def _resized(batch: Batch, rng: np.random.Generator) -> Batch:
    count, most = batch.input_ids.shape
    sizes_B1 = torch.from_numpy(rng.integers(2, most + 1, size=(count, 1)))
    starts_B1 = torch.from_numpy(rng.integers(1, most, size=(count, 1)))
    place_T = torch.arange(most)
    labels_BT = batch.input_ids.masked_fill(place_T < starts_B1, IGNORED)
    return Batch(batch.input_ids, (place_T < sizes_B1).long(), labels_BT)


def _score(pairs: Sequence[tuple[int, int]]) -> Score:
    """How many guesses are right to the token; chance is the commonest length everywhere."""
    guesses, targets = zip(*pairs, strict=True)
    hits = float(np.mean(np.equal(guesses, targets)))
    return Score(
        value=hits, chance=float(np.bincount(targets).max() / len(pairs)), count=len(pairs)
    )
