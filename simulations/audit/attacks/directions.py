"""Labels from dL/dh2 without any model: its norm, and its direction.

After Li et al. 2022, arXiv:2102.08504.

Shapes: B sequences, T tokens, D hidden size, N positions that count, P pairs of them.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flower_app.data.client import IGNORED
from simulations.audit.attack import Attack, NotApplicable, Score, Scores
from simulations.audit.observation import PUBLIC, Knowledge, Observation, Truth
from simulations.audit.ranks import auc
from simulations.audit.texts import Rarity

PAIRS = 200_000
"""Of positions, that are compared at most."""


class _OfGradients(Attack):
    """What both share: a gradient for each label that counts."""

    reads = ("dL/dh2",)
    levels: ClassVar[tuple[str, ...]] = (PUBLIC,)
    metric = "AUC"

    def collect(self, observation: Observation, truth: Truth) -> tuple[Tensor, Tensor]:
        """Gradients (N, D) and the labels (N,) that they are of."""
        gradients, labels = [], []
        for crossed, batch in zip(observation.crossed, truth.batches, strict=True):
            if crossed.grad_h2_BTD is None:
                raise NotApplicable("no dL/dh2 crossed: neither trunk nor bottom learns")
            next_BT = batch.labels[:, 1:]
            counts_BT = next_BT != IGNORED
            gradients.append(crossed.grad_h2_BTD[:, :-1][counts_BT])
            labels.append(next_BT[counts_BT])
        return torch.cat(gradients), torch.cat(labels)


class Norms(_OfGradients):
    """The norm tells how much a label surprised: rare ones from common ones."""

    name = "norms"
    finds = 0.6
    margin = 0.1

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`."""
        gradients_ND, labels_N = self.collect(observation, truth)
        share_N = Rarity(knowledge.public, knowledge.vocabulary).share_V[labels_N]
        rare_N = share_N < share_N.median()
        value = auc(gradients_ND.norm(dim=1), rare_N)
        return {self.metric: Score(value=value, chance=0.5, count=len(labels_N))}


class Directions(_OfGradients):
    """The direction tells which positions have the same label."""

    name = "directions"
    finds = 0.7
    margin = 0.1

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`."""
        gradients_ND, labels_N = self.collect(observation, truth)
        unit_ND = torch.nn.functional.normalize(gradients_ND, dim=1)
        pairs = torch.from_numpy(rng.integers(len(labels_N), size=(2, PAIRS)))
        one_P, other_P = pairs[:, pairs[0] != pairs[1]]
        alike_P = (unit_ND[one_P] * unit_ND[other_P]).sum(1)
        value = auc(alike_P, labels_N[one_P] == labels_N[other_P])
        return {self.metric: Score(value=value, chance=0.5, count=len(labels_N))}
