"""How far each client's state is from the cohort's middle, and who is an anomaly."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ANOMALOUS = 3.0
"""Who is so many times as far from the middle as the median client is named."""
FEWEST = 3
"""Of two, nobody can say which one is odd."""


def middle(states: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """The median of every coordinate over the clients, in float64; that of an even number lies
    half-way between two."""
    ordered = torch.stack([state[name].double() for state in states]).sort(0).values
    half, odd = divmod(len(states), 2)
    return ordered[half] if odd else (ordered[half - 1] + ordered[half]) / 2


def distances(states: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """The L2 distance of each client from the coordinates' median, over all of its tensors.

    A distance, not the length of an update: who turns its update round keeps its length. Adapters
    of mixed ranks have no common coordinates, and are left out.
    """
    squares = [0.0] * len(states)
    for name, first in states[0].items():
        if any(state[name].shape != first.shape for state in states):
            continue
        centre = middle(states, name)
        for client, state in enumerate(states):
            squares[client] += float((state[name].double() - centre).square().sum())
    return [math.sqrt(square) for square in squares]


def anomalies(who: Sequence[str], found: Sequence[float]) -> dict[str, dict[str, float]]:
    """Those who are `ANOMALOUS` times as far as the median client: `distance`, and `times`."""
    if len(found) < FEWEST:
        return {}
    usual = statistics.median(found)
    return {
        client: {"distance": distance, "times": distance / usual if usual else math.inf}
        for client, distance in zip(who, found, strict=True)
        if distance > ANOMALOUS * usual
    }
