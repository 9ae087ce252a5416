"""Where in the run a client is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the run a client is: what its randomness and its schedule depend on."""

    seed: int
    client: str
    round: int
    rounds: int
    secret: bytes = field(default=b"", repr=False)
    """With `link.cache_mb`, of this client alone: what the names of its examples are made with."""
