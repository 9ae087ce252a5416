"""answers to a job, piece by piece: what the model says, with log-probabilities where asked for"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from simulations.api.jobs import Job, Prompt
from simulations.api.processors import Recorder, processors
from simulations.api.scores import Scored, score_text
from simulations.api.wanted import Wanted
from simulations.talk.sampling import Sampling
from simulations.talk.speaker import Conversation, Speaker


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What is new of one choice."""

    index: int
    text: str = ""
    tokens: tuple[Scored, ...] = ()
    """Of the text, and the one that ended it; empty if no log-probabilities were asked for."""
    generated: int = 0
    """How many tokens were drawn for it."""
    finish: str = ""
    """Of the last one: stop or length."""


def answer(speaker: Speaker, job: Job, cancelled: threading.Event) -> Iterator[Delta]:
    """Answer each prompt `n` times, one after the other; the prompt is computed once."""
    index = 0
    for prompt in job.prompts:
        conversation = Conversation()
        for nth in range(job.wanted.n):
            if cancelled.is_set():
                return
            if job.echo:
                yield _echo(speaker, job, prompt, index)
            if prompt.room:
                yield from _say(speaker, job.wanted, prompt, index, nth, conversation, cancelled)
            else:
                yield Delta(index=index, finish="length")
            index += 1


def _echo(speaker: Speaker, job: Job, prompt: Prompt, index: int) -> Delta:
    top = job.wanted.top_logprobs
    tokens = () if top is None else tuple(score_text(speaker.model, prompt.ids, top))
    return Delta(index=index, text=prompt.text, tokens=tokens)


def _say(
    speaker: Speaker,
    wanted: Wanted,
    prompt: Prompt,
    index: int,
    nth: int,
    conversation: Conversation,
    cancelled: threading.Event,
) -> Iterator[Delta]:
    top, place = wanted.top_logprobs, len(prompt.ids)
    recorder = None if top is None else Recorder()
    pieces = speaker.stream(
        prompt.ids,
        sampling_of(wanted, prompt.room, nth),
        cancelled=cancelled,
        conversation=conversation,
        processors=processors(wanted, place, recorder),
    )
    for piece in pieces:
        tokens: tuple[Scored, ...] = ()
        if recorder is not None:
            at = enumerate(piece.ids, place)
            tokens = tuple(recorder.take(where, token, top or 0) for where, token in at)
        place += len(piece.ids)
        yield Delta(
            index=index,
            text=piece.text,
            tokens=tokens,
            generated=len(piece.ids),
            finish=piece.finish,
        )


def sampling_of(wanted: Wanted, room: int, nth: int) -> Sampling:
    """Return how the n-th answer is drawn: each under a seed of its own, given one for all."""
    greedy = wanted.temperature == 0 or wanted.top_p == 0
    return Sampling(
        max_tokens=room,
        temperature=0.0 if greedy else wanted.temperature,
        top_p=wanted.top_p or 1.0,
        top_k=wanted.top_k,
        seed=None if wanted.seed is None else (wanted.seed + nth) % 2**63,
        stop=wanted.stop,
    )
