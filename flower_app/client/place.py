"""Where in the run a client is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the run a client is: what its randomness and its schedule depend on."""

    seed: int
    client: str
    round: int
    rounds: int
