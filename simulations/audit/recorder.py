"""Plays a round of a run's clients in this process, and records what the server has of it.

The clients' own training step, the trunk's own sessions and the run's own frames, codecs and
defences are at work; nothing is simulated but Flower.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from conf.schema import Config
from flower_app.client import streamed
from flower_app.client.defences.defence import defend
from flower_app.client.defences.registry import make_defence
from flower_app.client.place import Place
from flower_app.client.plan import Plan, padding_id
from flower_app.data.client import Batch, ClientData, Example, load_client_data, load_tokenizer
from models import Part, Parts, client_state, load_client_state
from simulations.audit.observation import (
    EXACT,
    PUBLIC,
    STALE,
    START,
    Crossed,
    Knowledge,
    Observation,
    State,
    Truth,
)
from simulations.audit.subject import Subject
from simulations.audit.tap import TappedLink
from simulations.audit.texts import public_ids
from simulations.equality.fold import fold
from simulations.plan.rehearsal import alone
from strategies.aggregate.means import weighted_mean
from strategies.engine.engine import TrunkEngine

PUBLIC_TEXTS = 400
"""Pieces of public text, of a context each, at most."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """How much is trained and attacked."""

    clients: int = 2
    warm: int = 40
    """Steps of the round before the recorded one, so that ends are no longer what the run began
    with. Where a run has trained before: 0."""
    steps: int = 8
    """Of the recorded round."""
    sequences: int = 4
    """Attacked of each client's last step."""


@dataclass(eq=False, kw_only=True)
class Watched:
    """One client's recorded round."""

    observation: Observation
    truth: Truth
    exact: State
    """Its ends when the attacked h1 was made."""


@dataclass(eq=False)
class Recording:
    """A recorded round of all clients, and what attackers may know of it."""

    config: Config
    clients: list[Watched] = field(default_factory=list)
    first: State = field(default_factory=dict)
    """Ends that the run began with."""
    round_start: State = field(default_factory=dict)
    parts: Parts | None = None
    """To be filled with any of these."""

    def knowledge(self, client: Watched, level: str) -> Knowledge:
        """What an attacker of this level has against a client."""
        states = {EXACT: client.exact, STALE: self.round_start, START: self.first}
        bottom, top = self._foreign if level == PUBLIC else self._ends(states[level])
        tokenizer = load_tokenizer(self.config.model)
        return Knowledge(
            level=level,
            ends=lambda crossed: (bottom, top),
            tokenizer=tokenizer,
            vocabulary=self.vocabulary,
            public=self.public,
        )

    @cached_property
    def vocabulary(self) -> int:
        """How many ids a text may have: those of the tokenizer that the model embeds."""
        assert self.parts is not None
        own = self.parts.bottom.config.get_text_config(decoder=True).vocab_size
        return min(len(load_tokenizer(self.config.model)), own)

    @cached_property
    def public(self) -> list[list[int]]:
        """Public text as ids."""
        tokenizer = load_tokenizer(self.config.model)
        return public_ids(tokenizer, self.config.data.context, PUBLIC_TEXTS, self.vocabulary)

    def _ends(self, state: State) -> tuple[Part, Part]:
        assert self.parts is not None
        bottom, top = copy.deepcopy((self.parts.bottom, self.parts.top))
        load_client_state(bottom, top, state)
        return bottom.eval(), top.eval()

    @cached_property
    def _foreign(self) -> tuple[Part, Part]:
        """Ends of the architecture with random weights: all that is known without the model."""
        assert self.parts is not None
        bottom, top = copy.deepcopy((self.parts.bottom, self.parts.top))
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        for part in (bottom, top):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    scale = float(parameter.detach().std())
                    parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        return bottom.eval(), top.eval()


class Recorder:
    """The clients and the trunk of a run, in this process.

    Parameters
    ----------
    subject : Subject
        What is trained.
    scope : Scope
        How much.
    """

    def __init__(self, subject: Subject, scope: Scope) -> None:
        config = subject.config
        # Clients one after another, each alone with the trunk: what crosses is the same.
        self.config, self.scope = replace(config, train=alone(config.train)), scope
        self.tokenizer = load_tokenizer(config.model)
        self.parts, self.first = subject.parts(), subject.first()
        self.engine = TrunkEngine(
            self.parts.trunk,
            hidden_size=self.parts.trunk.hidden_size,
            train=self.config.train,
            seed=config.seed,
            max_in_flight=2**62,
        )
        self.state = _copied(client_state(self.parts.bottom, self.parts.top))
        self.data = [self._data(number) for number in range(scope.clients)]

    def record(self, number: int = 2) -> Recording:
        """Train a round that nobody watches, then record one.

        Parameters
        ----------
        number : int
            Of the recorded round: the order of the examples depends on it.
        """
        recording = Recording(self.config, first=self.first or self.state, parts=self.parts)
        if self.scope.warm:
            self._round(number - 1, self.scope.warm)
        recording.round_start = self.state
        recording.clients = self._round(number, self.scope.steps)
        return recording

    def _data(self, number: int) -> ClientData:
        return load_client_data(
            self.config.data,
            self.tokenizer,
            partition=number,
            partitions=self.scope.clients,
            seed=self.config.seed,
        )

    def _round(self, number: int, steps: int) -> list[Watched]:
        """All clients train, one after another, and are averaged."""
        self.engine.open_round(number, self._rounds(number), training=True)
        watched = [self._client(index, number, steps) for index in range(self.scope.clients)]
        weights = [sum(batch.tokens for batch in each.truth.batches) or 1 for each in watched]
        fold(
            self.engine,
            {each.observation.client: w for each, w in zip(watched, weights, strict=True)},
        )
        self.state = weighted_mean([each.observation.end for each in watched], weights)
        return watched

    def _rounds(self, number: int) -> int:
        """Of the run, which the schedule is of."""
        return max(number, self.config.train.rounds)

    def _client(self, index: int, number: int, steps: int) -> Watched:
        config, name, data = self.config, f"client-{index}", self.data[index]
        bottom, top = copy.deepcopy((self.parts.bottom, self.parts.top))
        load_client_state(bottom, top, self.state)
        defend(bottom, top, make_defence(config.privacy, secrets.token_bytes(32)))
        rounds = self._rounds(number)
        place = Place(seed=config.seed, client=name, round=number, rounds=rounds)
        pad_id = padding_id(bottom, self.tokenizer)
        own = replace(config, train=replace(config.train, local_steps=steps))
        seen = _Seen(Plan(data.train, own, place, pad_id=pad_id))
        exact: dict[str, Tensor] = {}

        def before(step: int, micro: int) -> None:
            if step == steps - 1 and micro == 0:
                exact.update(_copied(client_state(bottom, top)))

        session = self.engine.open(name, client=name, steps=steps)
        link = TappedLink(config.link, session, before)
        streamed.train(bottom, top, link, seen, steps, config.train, place)
        kept = [each for each in link.crossed.values() if each.step == steps - 1]
        rows = _shares(self.scope.sequences, [len(batch.input_ids) for batch in seen.last])
        return Watched(
            observation=Observation(
                config=config,
                client=name,
                crossed=[_first(each, count) for each, count in zip(kept, rows, strict=True)],
                start=self.state,
                end=_copied(client_state(bottom, top)),
                gradients=link.of_ends,
            ),
            truth=Truth(
                batches=[_first_rows(b, count) for b, count in zip(seen.last, rows, strict=True)],
                members=seen.examples,
                strangers=data.heldout,
            ),
            exact=exact,
        )


class _Seen:
    """Steps of a plan, of which the last one and all examples are remembered."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.last: list[Batch] = []
        self.examples: list[Example] = []

    def __iter__(self) -> Iterator[list[Batch]]:
        for batches in self._plan:
            self.last = batches
            self.examples += [each for batch in batches for each in _examples(batch)]
            yield batches


def _examples(batch: Batch) -> Iterator[Example]:
    rows = zip(batch.input_ids, batch.labels, batch.attention_mask.bool(), strict=True)
    for ids_T, labels_T, kept_T in rows:
        yield Example(ids_T[kept_T], labels_T[kept_T])


def _shares(most: int, sizes: Sequence[int]) -> list[int]:
    """How many sequences of each micro-batch are attacked."""
    counts: list[int] = []
    for size in sizes:
        counts.append(min(size, most - sum(counts)))
    return counts


def _first(crossed: Crossed, count: int) -> Crossed:
    tensors: dict[str, Any] = {
        name: None if value is None else value[:count]
        for name, value in vars(crossed).items()
        if name.endswith(("_BTD", "_BT"))
    }
    return replace(crossed, **tensors)


def _first_rows(batch: Batch, count: int) -> Batch:
    return Batch(batch.input_ids[:count], batch.attention_mask[:count], batch.labels[:count])


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
