"""Who takes part in a round, as the trunk's policies know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Round:
    """The round that is open: number (0 is the evaluation before training), and what it is for."""

    number: int
    rounds: int
    training: bool
    cohort: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One session's client, by its stable name, with the optimizer steps it announced. No two are
    equal: the same client's next session is another member."""

    client: str
    steps: int
    round: Round
