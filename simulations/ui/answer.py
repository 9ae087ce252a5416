"""An answer as the page shows it while it grows: text, figures, and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulations.talk.speaker import Piece, Sampling
from simulations.talk.stats import Figures, crossing, tally_of
from simulations.ui import turns
from simulations.ui.chats import Chat
from simulations.ui.talked import Talked
from strategies.errors import TrunkError

logger = logging.getLogger(__name__)

EVERY = 0.08
"""Seconds between two looks of the page."""

ENDED = {
    "stop": "",
    "length": "It reached max tokens. Raise it, or ask it to go on.",
    "cancelled": "Stopped. What was written is kept.",
}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page shows of an answer."""

    messages: turns.Messages
    figures: Figures
    going: bool = True
    words: str = ""
    """On how it ended."""
    failed: bool = False


def answer(
    talked: Talked, chat: Chat, messages: turns.Messages, system: str, sampling: Sampling
) -> Iterator[Shown]:
    """Answer the messages; the last of what is shown is not going.

    An answer that a newer one of the same chat has ended shows nothing more.
    """
    last = Shown(messages=messages, figures=Figures())
    yield last
    try:
        with chat.turn() as turn:
            ids = talked.speaker.prompt(turns.prompt(messages, system))
            pieces = talked.speaker.stream(
                ids, sampling, cancelled=turn, conversation=chat.conversation
            )
            for last in _shown(talked, messages, len(ids), pieces):
                if chat.is_current(turn):
                    yield last
    except (TrunkError, ValueError, OSError, RuntimeError) as error:
        logger.warning("an answer failed: %s", error)
        yield replace(last, going=False, failed=True, words=_failure(talked, error))


def _shown(
    talked: Talked, messages: turns.Messages, prompt: int, pieces: Iterator[Piece]
) -> Iterator[Shown]:
    text, told, first = "", 0.0, 0.0
    start, before, count = time.perf_counter(), tally_of(talked.speaker.model), 0
    for piece in pieces:
        text, count = text + piece.text, count + len(piece.ids)
        past = time.perf_counter() - start
        first = first or past
        if not piece.finish and past - told < EVERY:
            continue
        told = past
        figures = piece.figures or Figures(
            answers=1,
            prompt=prompt,
            tokens=count,
            seconds=past,
            first=first,
            **crossing(talked.speaker.model, before),
        )
        yield Shown(
            messages=turns.answered(messages, text),
            figures=figures,
            going=not piece.finish,
            words=_ending(piece, text),
        )


def _ending(piece: Piece, text: str) -> str:
    if piece.finish == "stop" and not text:
        return "The model ended its answer at once, without a word."
    return ENDED.get(piece.finish, "")


def _failure(talked: Talked, error: Exception) -> str:
    if isinstance(error, TrunkError) and talked.trunk:
        return f"The trunk at {talked.trunk} does not answer: {error}. Retry asks it again."
    return str(error)


def sampling_of(values: Sequence[Any]) -> Sampling:
    """Return the settings of the page's controls, in their order; an empty seed is none."""
    most, temperature, top_p, top_k, penalty, seed = values
    return Sampling(
        max_tokens=int(most or 0),
        temperature=float(temperature or 0.0),
        top_p=float(top_p or 0.0),
        top_k=int(top_k or 0),
        repetition_penalty=float(penalty or 0.0),
        seed=_seed(str(seed or "").strip()),
    )


def _seed(text: str) -> int | None:
    if text and not (text.isascii() and text.isdigit()):
        raise ValueError(f"the seed {text!r} is no whole number; leave it empty for none")
    return int(text) if text else None
