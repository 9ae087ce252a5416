"""`median`: every coordinate's median over the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from strategies.aggregate.robust.deviation import middle
from strategies.aggregate.robust.registry import Robust


class Median(Robust):
    """Each coordinate's median (Yin et al. 2018, arXiv:1803.01498, option I).

    Every client counts once, however many tokens it has.
    """

    name = "median"

    def combine(
        self,
        states: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
        distances: Sequence[float],
    ) -> dict[str, Tensor]:
        return {name: middle(states, name).to(first.dtype) for name, first in states[0].items()}
