"""Robust aggregation: what such a method is asked, and how `aggregation.robust` finds one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from conf.registry import kinds
from conf.rules import ConfigError, check_known
from conf.schema import AggregationConfig, FederationConfig


class Robust:
    """Makes one state of clients' states of which some may be poisoned.

    A client's ends and its trunk replica come as one state, so that it is judged by all of it. A
    new method is a file in this folder with a subclass that has a `name`.

    Parameters
    ----------
    how : AggregationConfig
        `byzantine` and `bound` are read.
    """

    name: ClassVar[str] = ""
    """What `aggregation.robust` calls it."""
    needs: ClassVar[tuple[int, int]] = (2, 1)
    """With these (a, b), f poisoned clients are withstood among a * f + b or more."""

    def __init__(self, how: AggregationConfig) -> None:
        self.byzantine, self.bound = how.byzantine, how.bound

    @property
    def least(self) -> int:
        """Fewest clients whose states it takes."""
        times, more = self.needs
        return times * self.byzantine + more

    def combine(
        self,
        states: Sequence[Mapping[str, Tensor]],
        shares: Sequence[float],
        distances: Sequence[float],
    ) -> dict[str, Tensor]:
        """Make one state of several.

        Parameters
        ----------
        states : sequence of mapping
            One for each client, `least` or more; names and shapes are alike, values finite.
        shares : sequence of float
            The clients' weights, which sum to one.
        distances : sequence of float
            How far each client is from the coordinates' median, over all of its tensors (L2).
        """
        raise NotImplementedError


def find_robust(how: AggregationConfig) -> Robust | None:
    """The method that `aggregation.robust` names; None for the plain mean.

    Raises
    ------
    ConfigError
        With the nearest name, if nobody offers it.
    """
    if how.robust == "none":
        return None
    found = kinds(__name__.rpartition(".")[0], Robust)
    check_known("aggregation.robust", how.robust, [*found, "none"])
    return found[how.robust](how)


def fewest(how: AggregationConfig) -> int:
    """How many answers a round needs at least to be aggregated in this way."""
    method = find_robust(how)
    return method.least if method is not None else 1


def check_enough(how: AggregationConfig, federation: FederationConfig) -> None:
    """Refuse a method that the smallest cohort would be too small for, with a `ConfigError`."""
    if federation.min_clients < (least := fewest(how)):
        raise ConfigError(
            f"aggregation.robust={how.robust} with aggregation.byzantine={how.byzantine} needs "
            f"{least} clients in every round, and federation.min_clients="
            f"{federation.min_clients} lets one begin with fewer: set federation.min_clients="
            f"{least}, or lower aggregation.byzantine",
            key="federation.min_clients",
        )
