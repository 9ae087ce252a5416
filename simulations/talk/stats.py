"""What an answer took: tokens, seconds, parts and bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from models.elsewhere import Tally

PARTS = ("bottom", "network", "trunk", "top")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one answer, or of several added up.

    The parts are the model's `tally`: while several answers run at once on one model, those of all.
    """

    answers: int = 0
    prompt: int = 0
    """Tokens of the prompts."""
    reused: int = 0
    """Of these, those that were still in the cache."""
    tokens: int = 0
    """New tokens."""
    seconds: float = 0.0
    first: float = 0.0
    """Seconds to the first token."""
    parts: tuple[float, ...] = ()
    """Seconds in bottom, network, trunk and top; empty if the model is not split."""
    positions: int = 0
    """Hidden vectors that crossed the cut each way: of prompts and new tokens."""
    trips: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: Figures) -> Figures:
        mine, its = dataclasses.asdict(self), dataclasses.asdict(other)
        parts = tuple(a + b for a, b in zip(self.parts, other.parts, strict=False))
        summed = {name: mine[name] + its[name] for name in mine if name != "parts"}
        return Figures(**summed, parts=parts or self.parts or other.parts)

    @property
    def rate(self) -> float:
        """New tokens a second, from the question to the end."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def ms(self) -> float:
        """Milliseconds for each new token."""
        return 1000 * self.seconds / self.tokens if self.tokens else 0.0

    @property
    def ms_of(self) -> dict[str, float]:
        """Milliseconds for each new token by part, with what prompts took; empty if not split."""
        each = 1000 / self.tokens if self.tokens else 0.0
        return {name: each * seconds for name, seconds in zip(PARTS, self.parts, strict=False)}

    @property
    def each_trip(self) -> float:
        """New tokens for each trip to the trunk; 0 if the model is not split."""
        return self.tokens / self.trips if self.trips else 0.0

    @property
    def bytes_each(self) -> tuple[float, float]:
        """Bytes up and down for each position that crossed the cut."""
        count = max(self.positions, 1)
        return self.bytes_up / count, self.bytes_down / count

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON takes it."""
        known = {**dataclasses.asdict(self), "parts": dict(zip(PARTS, self.parts, strict=False))}
        return {**known, "tokens_per_second": self.rate, "ms_per_token": self.ms}


def tally_of(model: PreTrainedModel) -> Tally | None:
    """Return a copy of a split model's running sums; None if it is not split."""
    tally = getattr(model, "tally", None)
    return tally.copy() if isinstance(tally, Tally) else None


def crossing(model: PreTrainedModel, before: Tally | None) -> dict[str, Any]:
    """Return what a split model did since `before`, as `Figures` takes it."""
    if before is None:
        return {}
    done = model.tally.copy() - before
    return {
        "parts": tuple(getattr(done, f"seconds_{name}") for name in PARTS),
        "positions": done.positions,
        "trips": done.trips,
        "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down,
    }
