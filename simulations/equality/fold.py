"""The end of a round in which nothing but the trunk is averaged."""

from __future__ import annotations

from collections.abc import Mapping

from strategies.aggregate.means import weighted_mean
from strategies.engine.engine import TrunkEngine


def fold(engine: TrunkEngine, weights: Mapping[str, float]) -> None:
    """Close the round, and put the mean of these sessions' replicas, if there are any, into the
    trunk, whose cut all of them must have."""
    replicas, _ = engine.collect(weights)
    if engine.policy.replicates and weights:
        engine.policy.load(weighted_mean(list(replicas.values()), list(weights.values())))
