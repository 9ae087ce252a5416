"""Hears each token that `generate` draws: text for the reader, and when to stop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from simulations.talk.words import Stops, Words

PATIENCE = 2.0
"""Seconds that a cancelled answer has to end in; then nobody waits for it any longer."""
_LOOK = 0.1
"""Seconds between two looks at whether an answer is cancelled, while no token comes."""


@dataclass(frozen=True)
class Heard:
    """Text that is certain, and the tokens drawn since the last."""

    text: str
    ids: tuple[int, ...]


class Listener(StoppingCriteria):
    """Stands among the stopping criteria: the one place that sees every token in the loop.

    Tokens after which the text is not whole yet (half a character, the beginning of a stop string)
    go with the next text that is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        eos: Set[int],
        stop: Sequence[str],
        cancelled: threading.Event | None,
    ) -> None:
        self.heard: queue.SimpleQueue[Heard | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.abandoned = False
        self.made: tuple[Any, list[int]] | None = None
        """What `generate` leaves: the cache, and all tokens."""
        self.count = 0
        self.first: float | None = None
        self._words, self._stops = Words(tokenizer, prompt), Stops(stop)
        self._eos, self._seen, self._cancelled = eos, len(prompt), cancelled
        self._ended = self._cut = False
        self._ids: list[int] = []

    @property
    def finish(self) -> str:
        """Why the answer is over: what it is if nothing else ended it is its length."""
        if self._ended or self._stops.found:
            return "stop"
        return "cancelled" if self._cut else "length"

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        """Take what is new in the row; tell `generate` whether to stop."""
        self.first = self.first or time.perf_counter()
        for token in input_ids[0, self._seen :].tolist():
            self._hear(token)
        self._seen = input_ids.shape[1]
        self._cut = self._cut or self._wanted_to_end()
        over = self._ended or self._stops.found or self._cut
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)

    def next(self) -> Heard | None:
        """Wait for text; None at the end, or once a cancelled answer has had its time to end."""
        left = PATIENCE
        while left > 0:
            try:
                return self.heard.get(timeout=_LOOK)
            except queue.Empty:
                left -= _LOOK if self._wanted_to_end() else 0.0
        self._cut = True
        return None

    def rest(self) -> tuple[str, tuple[int, ...]]:
        """Return what was held back, at the end."""
        text = self._stops.add(self._words.rest())
        return text + self._stops.rest(), self._drawn()

    def _hear(self, token: int) -> None:
        if self._ended or self._stops.found:
            return  # drawn along with one that ended the text
        self.count += 1
        self._ids.append(token)
        if token in self._eos:
            self._ended = True
            return
        text = self._stops.add(self._words.add([token]))
        if text:
            self.heard.put(Heard(text, self._drawn()))

    def _drawn(self) -> tuple[int, ...]:
        drawn, self._ids = tuple(self._ids), []
        return drawn

    def _wanted_to_end(self) -> bool:
        return self.abandoned or (self._cancelled is not None and self._cancelled.is_set())
