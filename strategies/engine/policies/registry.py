"""The trunk update policies that `train.strategy` may name: all that this folder holds."""

from __future__ import annotations

from conf.registry import kinds
from conf.rules import check_known
from strategies.engine.policy import Policy


def policies() -> dict[str, type[Policy]]:
    """Every policy by its name."""
    return kinds(__name__.rpartition(".")[0], Policy)


def find_policy(name: str) -> type[Policy]:
    """The policy of a name; `ConfigError` with the nearest one if there is none."""
    found = policies()
    check_known("train.strategy", name, found)
    return found[name]
