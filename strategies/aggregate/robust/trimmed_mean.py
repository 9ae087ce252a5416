"""`trimmed-mean`: every coordinate's mean without the f largest and the f smallest values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strategies.aggregate.robust.registry import Robust


class TrimmedMean(Robust):
    """The mean of what is left of each coordinate (Yin et al. 2018, arXiv:1803.01498, option II).

    Every client counts once. Flower's `trim_mean` takes f as a share of n, and `int(n * (f / n))`
    is f - 1 for some; here f is f.
    """

    name = "trimmed-mean"

    def combine(
        self,
        states: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
        distances: Sequence[float],
    ) -> dict[str, Tensor]:
        kept, means = slice(self.byzantine, len(states) - self.byzantine), {}
        for name, first in states[0].items():
            ordered = torch.stack([state[name].double() for state in states]).sort(0).values
            means[name] = ordered[kept].mean(0).to(first.dtype)
        return means
