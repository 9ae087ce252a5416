"""Plays a round of a run's clients in this process, and records what the server has of it.

The clients' own training step, the trunk's own sessions and the run's own frames, codecs and
defences are at work; nothing is simulated but Flower.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flower_app.client import streamed
from flower_app.client.defences.defence import defend
from flower_app.client.defences.registry import make_defence
from flower_app.client.noisy import noisy_ends
from flower_app.client.perturbed import perturb
from flower_app.client.place import Place
from flower_app.client.plan import Plan, padding_id
from flower_app.client.site_key import KEY_BYTES, SiteKey
from flower_app.data.client import Batch, ClientData, Example, load_client_data, load_tokenizer
from models import client_state, load_client_state, named_trainable, trainable_state
from simulations.audit.observation import Canary, Crossed, Observation, Truth
from simulations.audit.recording import Recording, Scope, Watched
from simulations.audit.subject import Subject
from simulations.audit.tap import TappedLink
from simulations.plan.rehearsal import alone
from strategies.aggregate.means import weighted_mean
from strategies.engine.engine import TrunkEngine

CANARY, DIGITS = "The private number of {name} is ", 6
"""What is said before a planted secret, and how long it is."""
NAMES = ("Ada Quill", "Bo Tarn", "Cy Vane", "Di Wolff")


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
        self.common_step = config.train.sync == "step"
        self.tokenizer = load_tokenizer(config.model)
        self.site_key = SiteKey(secrets.token_bytes(KEY_BYTES))
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
        recording.clients = self._round(number, self.scope.steps, self.scope.canaries)
        recording.round_end = self.state
        recording.trunk_end = _copied(trainable_state(self.parts.trunk))
        return recording

    def _data(self, number: int) -> ClientData:
        return load_client_data(
            self.config.data,
            self.tokenizer,
            partition=number,
            partitions=self.scope.clients,
            seed=self.config.seed,
        )

    def _round(self, number: int, steps: int, canaries: Sequence[int] = ()) -> list[Watched]:
        """All clients train, one after another, and are averaged."""
        self.engine.open_round(number, self._rounds(number), training=True)
        before = _copied(trainable_state(self.parts.trunk))
        watched = [
            self._client(index, number, steps, canaries) for index in range(self.scope.clients)
        ]
        weights = [each.weight for each in watched]
        names = [each.observation.client for each in watched]
        replicas, _ = self.engine.collect(names)
        if replicas:
            self.engine.policy.load(weighted_mean([replicas[name] for name in names], weights))
        after = _copied(trainable_state(self.parts.trunk))
        for each in watched:
            each.observation.trunk_start = before
            each.observation.trunk_end = _copied(replicas.get(each.observation.client, after))
        self.state = weighted_mean([each.observation.end for each in watched], weights)
        return watched

    def _rounds(self, number: int) -> int:
        """Of the run, which the schedule is of."""
        return max(number, self.config.train.rounds)

    def _client(self, index: int, number: int, steps: int, canaries: Sequence[int]) -> Watched:
        config, name = self.config, f"client-{index}"
        bottom, top = copy.deepcopy((self.parts.bottom, self.parts.top))
        load_client_state(bottom, top, self.state)
        secret = secrets.token_bytes(32)
        perturb(bottom, top, self.site_key, config.privacy.perturb)
        defend(bottom, top, make_defence(config.privacy, secret))
        place = Place(seed=config.seed, client=name, round=number, rounds=self._rounds(number))
        planted = [_canary(repeats, index, config.seed) for repeats in canaries]
        own = replace(config, train=replace(config.train, local_steps=steps))
        examples = self._examples(index, steps, planted)
        seen = _Seen(Plan(examples, own, place, pad_id=padding_id(bottom, self.tokenizer)))
        exact: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}

        def before(step: int, micro: int) -> None:
            if step == steps - 1 and micro == 0:
                exact.update(_copied(client_state(bottom, top)))

        def after(step: int) -> None:
            if self.common_step and step == steps - 1:
                both = named_trainable(bottom, top).items()
                gradients.update(_copied({n: p.grad for n, p in both if p.grad is not None}))

        session = self.engine.open(name, client=name, steps=steps)
        link = TappedLink(config.link, session, before, after)
        streamed.train(bottom, top, link, seen, steps, config.train, place)
        kept = [each for each in link.crossed.values() if each.step == steps - 1]
        rows = _shares(self.scope.sequences, [len(batch.input_ids) for batch in seen.last])
        return Watched(
            observation=Observation(
                config=config,
                client=name,
                crossed=[_first(each, count) for each, count in zip(kept, rows, strict=True)],
                heard=list(link.crossed.values()),
                start=self.state,
                end=noisy_ends(
                    config.privacy,
                    self.state,
                    _copied(client_state(bottom, top)),
                    secret,
                    f"{number}",
                ),
                gradients=gradients,
            ),
            truth=Truth(
                batches=[_first_rows(b, count) for b, count in zip(seen.last, rows, strict=True)],
                last=[each for batch in seen.last for each in _examples(batch)],
                members=seen.examples,
                strangers=self.data[index].heldout,
                canaries=planted,
            ),
            exact=exact,
            weight=sum(int((each.labels >= 0).sum()) for each in seen.examples),
        )

    def _examples(self, index: int, steps: int, planted: Sequence[Canary]) -> list[Example]:
        """What a client trains on: its own examples, or as few as the round takes, with secrets."""
        train, scope = self.data[index].train, self.scope
        if not planted and scope.reuse == 1:
            return train
        told = [self._encoded(each) for each in planted for _ in range(each.repeats)]
        sizes = self.config.train.batch_size * self.config.train.accumulate
        count = max(1, steps * sizes // scope.reuse - len(told))
        order = np.random.default_rng([self.config.seed, index]).permutation(len(train))
        return [*(train[i] for i in order[:count]), *told]

    def _encoded(self, canary: Canary) -> Example:
        text = canary.before + canary.secret
        ids_T = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Example(ids_T, ids_T)


def _canary(repeats: int, index: int, seed: int) -> Canary:
    rng = np.random.default_rng([seed, index, repeats])
    name = NAMES[(index + repeats) % len(NAMES)]
    secret = "".join(map(str, rng.integers(10, size=DIGITS)))
    return Canary(repeats=repeats, before=CANARY.format(name=name), secret=secret)


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
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
