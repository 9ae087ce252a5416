"""Where adapters are averaged: what an aggregator, which `aggregation.lora` names, does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from conf.registry import kinds
from conf.rules import check_known
from strategies.aggregate.means import weighted_mean


class Aggregator:
    """The weighted mean of every tensor. A kind overrides what it does otherwise.

    A new one is a file in this folder with a subclass that has a `name`; see `find_aggregator`.
    """

    name: ClassVar[str] = ""
    """What `aggregation.lora` calls it."""
    by_product: ClassVar[bool] = False
    """Whether what adapters add is averaged, not their factors: then ranks may differ."""
    exact: ClassVar[bool] = False
    """With `by_product`: whether a residual holds what the rank cannot."""
    frozen_A: ClassVar[bool] = False
    """Whether lora_A stays at its seeded start, and is in nobody's state."""

    def combine(
        self,
        states: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
        who: Sequence[str],
        dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Make one state of several.

        Parameters
        ----------
        states : sequence of mapping
            One for each client, in the order of their names; names and shapes are alike. With
            `by_product` they are without the adapters' factors.
        shares : sequence of float
            Their weights, which sum to one.
        who : sequence of str
            The clients' names, for errors.
        dtype : torch.dtype, optional
            Of the result; by default that of the first state.
        """
        return weighted_mean(states, shares, who=who, dtype=dtype)


def find_aggregator(name: str) -> type[Aggregator]:
    """The aggregator of a name; `ConfigError` with the nearest one if there is none."""
    found = kinds(__name__.rpartition(".")[0], Aggregator)
    check_known("aggregation.lora", name, found)
    return found[name]
