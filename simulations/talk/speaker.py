"""Answers of any Hugging Face model, split or not, as text that comes while it is made."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    Cache,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from simulations.talk.chance import Chance, let_others_draw
from simulations.talk.conversation import Conversation
from simulations.talk.listen import PATIENCE, Listener
from simulations.talk.prompt import Messages, Prompts
from simulations.talk.sampling import Sampling, defaults
from simulations.talk.stats import Figures, crossing, tally_of

__all__ = ["Conversation", "Figures", "Piece", "Sampling", "Speaker"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Text of an answer, in whole characters, with the tokens drawn since the last piece."""

    text: str
    ids: tuple[int, ...] = ()
    finish: str = ""
    """Of the last piece: `stop` (it ended by itself, or before a stop string), `length` or
    `cancelled`."""
    figures: Figures | None = None
    """Of the last piece: what the answer took."""


class Speaker:
    """Lets a model answer.

    `transformers`' own `generate` makes each answer in a thread. Several may be made at once, each
    with random numbers of its own: the same seed gives the same answer, alone or not.

    Parameters
    ----------
    model, tokenizer
        Any causal language model and what it reads.
    name : str
        What it is called.
    options : mapping
        Given to `generate` as they are, for answers without logits processors of their own: those
        of `simulations.talk.speculate`, for instance.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.prompts = Prompts(tokenizer)
        self.defaults: Sampling = defaults(model)
        """How the model itself asks to be sampled."""
        text = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        """Tokens of prompt and answer at most; None: no limit is known."""
        self._vocabulary = int(text.vocab_size)
        self._options = dict(options or {})
        if self._options:
            let_others_draw(self.model)
        self._eos = _eos(model, tokenizer) | self.prompts.turn_ends()

    def prompt(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation: by the chat template, or as plain text."""
        return self.prompts.of(messages)

    def stream(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        *,
        cancelled: threading.Event | None = None,
        conversation: Conversation | None = None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Iterator[Piece]:
        """Answer a prompt, piece by piece; the last piece has a `finish`, and may have no text.

        Whoever stops reading ends the answer. One that does not end although it is cancelled (a
        trunk that does not answer) is left to itself after a while, and no longer heard.

        Parameters
        ----------
        ids : sequence of int
            The prompt.
        cancelled : threading.Event, optional
            Ends the answer after the token that is being made.
        conversation : Conversation, optional
            Keeps what is computed, and saves what it has already.
        processors : sequence of LogitsProcessor, optional
            Change or see the logits of each step, in this order, before temperature and the like.

        Raises
        ------
        ValueError
            If the prompt is empty, too long or not of the model's vocabulary; before anything runs.
        TrunkError
            If the model is split and its trunk fails; the conversation can go on.
        """
        sampling = sampling or self.defaults
        room = self._room(ids)
        held = conversation or Conversation()
        listener = Listener(self.tokenizer, ids, self._eos, sampling.stop, cancelled)
        bounded = _bounded(sampling, room)
        return self._answer(list(ids), bounded, held, listener, processors)

    def _answer(
        self,
        ids: list[int],
        sampling: Sampling,
        conversation: Conversation,
        listener: Listener,
        processors: Sequence[LogitsProcessor],
    ) -> Iterator[Piece]:
        with conversation.answering():
            start, before = time.perf_counter(), tally_of(self.model)
            cache, reused = conversation.take(ids)
            run = threading.Thread(
                target=self._run, args=(ids, sampling, cache, listener, processors), daemon=True
            )
            run.start()
            try:
                yield from _pieces(listener)
            finally:
                listener.abandoned = True
                run.join(PATIENCE)
                if not run.is_alive() and listener.made is not None:
                    conversation.keep(*listener.made)
            if listener.error is not None:
                raise listener.error
            seconds = time.perf_counter() - start
            figures = Figures(
                answers=1,
                prompt=len(ids),
                reused=reused,
                tokens=listener.count,
                seconds=seconds,
                first=(listener.first or time.perf_counter()) - start,
                **crossing(self.model, before),
            )
            text, drawn = listener.rest()
            yield Piece(text=text, ids=drawn, finish=listener.finish, figures=figures)

    def _run(
        self,
        ids: list[int],
        sampling: Sampling,
        cache: Cache | None,
        listener: Listener,
        processors: Sequence[LogitsProcessor],
    ) -> None:
        """Let `generate` make the answer; whatever it raises is for the reader."""
        try:
            self._generate(ids, sampling, cache, listener, processors)
        except BaseException as error:  # noqa: BLE001 - handed to the reader's thread
            listener.error = error
        finally:
            listener.heard.put(None)

    def _generate(
        self,
        ids: list[int],
        sampling: Sampling,
        cache: Cache | None,
        listener: Listener,
        processors: Sequence[LogitsProcessor],
    ) -> None:
        ids_BT = torch.tensor([ids], device=self.model.device)
        with Chance(sampling.seed, self.model.device) as chance:
            made = self.model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                generation_config=sampling.configure(self.model, self._eos, self._pad),
                logits_processor=[*processors, chance.before],
                stopping_criteria=StoppingCriteriaList([chance.after, listener]),
                **({} if cache is None else {"cache": cache}),
                **self._fitting(len(ids) + sampling.max_tokens, processors),
            )
        listener.made = getattr(made, "cache", None), made.sequences[0].tolist()

    def _fitting(self, longest: int, processors: Sequence[LogitsProcessor]) -> dict[str, Any]:
        """The options, unless they do not suit an answer that may make the text so long."""
        ahead = self._options.get("prompt_lookup_num_tokens", 0)
        if ahead and self.context is not None and longest + ahead > self.context:
            return {}  # what is looked up may lie beyond the end of the text
        # A draft would be asked, too, by processors that see or change each step.
        return {} if processors else self._options

    @property
    def _pad(self) -> int:
        known = (self.model.generation_config.pad_token_id, self.tokenizer.pad_token_id, *self._eos)
        return next((token for token in known if token is not None), 0)

    def _room(self, ids: Sequence[int]) -> int | None:
        """Return how many tokens an answer may have, or refuse the prompt."""
        if not ids:
            raise ValueError("the prompt is empty, and the model has no token to begin with: write")
        wrong = [token for token in ids if not 0 <= token < self._vocabulary]
        if wrong:
            raise ValueError(
                f"the prompt has the token {wrong[0]}, and the model knows {self._vocabulary}: "
                "the tokenizer is not this model's"
            )
        if self.context is None:
            return None
        if len(ids) >= self.context:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens, and the model takes {self.context:,} with "
                "the answer: shorten it, or begin anew"
            )
        return self.context - len(ids)


def _bounded(sampling: Sampling, room: int | None) -> Sampling:
    if room is None or sampling.max_tokens <= room:
        return sampling
    return replace(sampling, max_tokens=room)


def _pieces(listener: Listener) -> Iterator[Piece]:
    while (one := listener.next()) is not None:
        yield Piece(text=one.text, ids=one.ids)


def _eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end a text, of the model's settings and of the tokenizer."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list | tuple) else [own]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}
