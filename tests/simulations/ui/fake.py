"""A speaker that says what it is told, at a pace, with the interface of `simulations.talk`'s."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from models.elsewhere import Tally
from simulations.talk.speaker import Piece, Sampling
from simulations.talk.stats import Figures
from strategies.errors import TrunkError


def _add(tally: Tally, seconds: float) -> None:
    """Count a token that took so long and crossed the cut once."""
    tally.positions, tally.trips = tally.positions + 1, tally.trips + 1
    tally.seconds_bottom += 0.1 * seconds
    tally.seconds_network += 0.2 * seconds
    tally.seconds_trunk += 0.5 * seconds
    tally.seconds_top += 0.2 * seconds
    tally.bytes_up, tally.bytes_down = tally.bytes_up + 1066, tally.bytes_down + 1058


@dataclass
class FakeSpeaker:
    """Answers "N: words words ..." to the N-th prompt; what it was asked is kept."""

    name: str = "20261126-074713-demo"
    words: str = "so it goes on and on, "
    most: int = 12
    pace: float = 0.05
    asked: list[list[dict[str, str]]] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)
    broken: str = ""
    chats: bool = True
    split: bool = True

    def __post_init__(self) -> None:
        self.prompts = SimpleNamespace(chats=self.chats)
        self.defaults, self.context = Sampling(), 512
        self.model = SimpleNamespace(tally=Tally()) if self.split else SimpleNamespace()

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        self.asked.append([dict(one) for one in messages])
        return list(range(sum(len(one["content"]) for one in messages)))

    def stream(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        cancelled: threading.Event | None = None,
        conversation: Any = None,
    ) -> Iterator[Piece]:
        sampling = sampling or self.defaults
        self.samplings.append(sampling)
        yield Piece(text=f"{len(self.asked)}: ", ids=(1,))
        start = time.perf_counter()
        for count in range(1, self.most + 1):
            if self.broken:
                raise TrunkError(self.broken)
            if cancelled is not None and cancelled.wait(self.pace):
                yield self._last("cancelled", ids, count, start)
                return
            if self.split:
                _add(self.model.tally, self.pace)
            yield Piece(text=self.words, ids=(count,))
            if count >= sampling.max_tokens:
                yield self._last("length", ids, count, start)
                return
        yield self._last("stop", ids, self.most, start)

    def _last(self, finish: str, ids: Sequence[int], count: int, start: float) -> Piece:
        each = self.pace * count
        return Piece(
            text="",
            finish=finish,
            figures=Figures(
                answers=1,
                prompt=len(ids),
                tokens=count,
                seconds=time.perf_counter() - start,
                first=self.pace,
                parts=(0.1 * each, 0.2 * each, 0.5 * each, 0.2 * each) if self.split else (),
                positions=count if self.split else 0,
                bytes_up=1066 * count,
                bytes_down=1058 * count,
            ),
        )
