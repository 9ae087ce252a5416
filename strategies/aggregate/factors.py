"""The aggregators `factors` and `ffa`: A and B are averaged each on its own, of one rank."""

from __future__ import annotations

from strategies.aggregate.aggregator import Aggregator


class Factors(Aggregator):
    """The mean of A and the mean of B."""

    name = "factors"


class FFA(Aggregator):
    """A stays as it is, so that the mean of B is exact (Sun et al. 2024, arXiv:2403.12313)."""

    name = "ffa"
    frozen_A = True
