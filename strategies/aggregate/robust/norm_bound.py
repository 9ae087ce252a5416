"""`norm-bound`: nobody is further from the middle than a multiple of the median client."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strategies.aggregate.robust.deviation import middle
from strategies.aggregate.robust.registry import Robust


class NormBound(Robust):
    """The mean by tokens, once who is too far out is drawn in to `bound` times the median distance.

    Norm bounding (Sun et al. 2019, arXiv:1911.07963) around the coordinates' median in place of the
    round's start, as centred clipping has it (Karimireddy et al. 2021, arXiv:2012.10333): an update
    that is turned round is as long as an honest one, but far from it.
    """

    name = "norm-bound"

    def combine(
        self,
        states: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
        distances: Sequence[float],
    ) -> dict[str, Tensor]:
        most = self.bound * statistics.median(distances)
        kept = [1.0 if distance <= most else most / distance for distance in distances]
        means = {}
        for name, first in states[0].items():
            centre = middle(states, name)
            moved = torch.zeros_like(centre)
            for state, share, factor in zip(states, shares, kept, strict=True):
                moved.add_(state[name].double() - centre, alpha=share * factor)
            means[name] = (centre + moved).to(first.dtype)
        return means
