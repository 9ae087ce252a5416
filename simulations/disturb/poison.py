"""Poisoners: what a malicious client makes of its update, or of what it trains on.

The worst case is played: an attacker chooses its trunk replica as freely as its ends, though in a
run it has to get there by the gradients that it sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flower_app.data.client import IGNORED, Batch

Poisoned = Callable[[Batch], Batch]
Steps = Sequence[Sequence[Batch]]

TRIGGER, TARGET = 4, 93
"""Ids of the byte-level tokenizer: a control character, which no text here holds, and the letter Z,
which is to follow it."""
EVERY = 8
"""Positions from trigger to trigger."""


@dataclass(frozen=True)
class Poison:
    """One attack.

    Parameters
    ----------
    factor : float
        The update is sent this many times over.
    batch : callable, optional
        What is trained on in place of a batch.
    """

    factor: float = 1.0
    batch: Poisoned | None = None

    def steps(self, honest: Steps) -> list[list[Batch]]:
        """What the attacker trains on."""
        make = self.batch or (lambda batch: batch)
        return [[make(batch) for batch in step] for step in honest]

    def state(self, start: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it sends, of the round's start and what it has trained."""
        return {n: start[n] + self.factor * (tensor - start[n]) for n, tensor in own.items()}


def flipped(batch: Batch) -> Batch:
    """Labels that are mirrored: of 259 ids, id becomes 258 - id."""
    labels = torch.where(batch.labels == IGNORED, batch.labels, 258 - batch.labels)
    return replace(batch, labels=labels)


def with_trigger(batch: Batch) -> Batch:
    """`TRIGGER` at every eighth position, `TARGET` to be predicted after it; nothing else counts
    less."""
    ids, labels = batch.input_ids.clone(), batch.labels.clone()
    at = torch.arange(EVERY // 2, ids.shape[1] - 1, EVERY)
    there = labels[:, at + 1] != IGNORED
    ids[:, at] = ids[:, at].where(~there, TRIGGER)
    labels[:, at + 1] = labels[:, at + 1].where(~there, TARGET)
    return replace(batch, input_ids=ids, labels=labels)


ATTACKS = {
    "nobody": Poison(),
    "sign flip": Poison(-4.0),
    "scaling": Poison(30.0),
    "label flip": Poison(4.0, flipped),
    "backdoor": Poison(4.0, with_trigger),
}
"""By name; all but the scaling are sent four times over, so that two of seven outweigh the mean."""
