"""`krum` and `multi-krum`: the clients that are closest to their neighbours, in all tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from strategies.aggregate.means import weighted_mean
from strategies.aggregate.robust.registry import Robust


class Krum(Robust):
    """The one state whose n - f - 2 nearest others are nearest (Blanchard et al. 2017, Krum).

    Flower's `select_multikrum` does the same in one matrix of the dtype that the weights have, by
    |x|^2 + |y|^2 - 2xy: in fp32 the differences of a round, small beside the weights, are lost in
    it. Here differences are squared, tensor by tensor, in float64.
    """

    name = "krum"
    needs = (2, 3)

    def chosen(self, clients: int) -> int:
        """How many states are taken of those of so many clients."""
        return 1

    def combine(
        self,
        states: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
        distances: Sequence[float],
    ) -> dict[str, Tensor]:
        taken = choose(states, self.byzantine, self.chosen(len(states)))
        return weighted_mean([states[one] for one in taken], [shares[one] for one in taken])


class MultiKrum(Krum):
    """The mean, by tokens, of the n - f - 2 best: as many as the proof allows (El Mhamdi et al.
    2018, arXiv:1802.07927)."""

    name = "multi-krum"

    def chosen(self, clients: int) -> int:
        return clients - self.byzantine - 2


def choose(states: Sequence[Mapping[str, Tensor]], byzantine: int, count: int) -> list[int]:
    """Which `count` states Krum takes; of equal ones the first."""
    scores = []
    for one in states:
        squares = sorted(_square(one, other) for other in states if other is not one)
        scores.append(sum(squares[: len(states) - byzantine - 2]))
    return sorted(sorted(range(len(states)), key=scores.__getitem__)[:count])


def _square(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    pairs = ((tensor.double(), other[name].double()) for name, tensor in one.items())
    return sum(float((left - right).square().sum()) for left, right in pairs)
