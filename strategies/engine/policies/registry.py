"""The trunk update policies that `train.strategy` may name: all that this folder holds."""

from __future__ import annotations

from strategies.discover import chosen, kinds
from strategies.engine.policy import Policy


def policies() -> dict[str, type[Policy]]:
    """Every policy by its name."""
    return kinds(__name__.rpartition(".")[0], Policy)


def find_policy(name: str) -> type[Policy]:
    """The policy of a name; `ValueError` with the nearest one if there is none."""
    return chosen(policies(), name, "train.strategy")
