"""The aggregators `exact` and `svd`: products of A and B are averaged, of any rank, by `lora`."""

from __future__ import annotations

from strategies.aggregate.aggregator import Aggregator


class Exact(Aggregator):
    """What the rank cannot hold goes into the base weights (arXiv:2410.09432, 2409.05976)."""

    name = "exact"
    by_product, exact = True, True


class SVD(Aggregator):
    """Cut to each recipient's rank: the least error that any adapter of it has."""

    name = "svd"
    by_product = True
