"""The six ways of training that the study compares, each a round at a time.

All of them take the same cohort: for every client the same micro-batches of every step. `split`
methods run Graft's own engine and client code in this process, without Flower and without a wire.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor
from transformers import PreTrainedModel

from conf.schema import TrainConfig
from flower_app.client import streamed
from flower_app.client.place import Place
from models import Cut, Part, client_state, load_client_state, split
from simulations.equality.fold import fold
from simulations.equality.local_link import LocalLink
from simulations.equality.reference import Steps, centralised_round, fed_avg_round, plain_optimizer
from strategies.aggregate.means import weighted_mean
from strategies.engine.engine import TrunkEngine

Cohort = Sequence[Steps]
Round = Callable[[Cohort, int], None]
"""Trains the global model in place for one round, given its number from 1."""

METHODS = {
    "centralised": "centralised",
    "merged-step": "merged, sync=step",
    "merged-round": "merged, sync=round",
    "splitfed-v2": "splitfed-v2",
    "fedavg": "FedAvg, unsplit",
    "splitfed-v1": "splitfed-v1",
}
"""Each method, and what it is called in tables and plots."""

SAME = {"splitfed-v1": "fedavg", "merged-step": "centralised"}
"""Methods that must coincide with one of plain PyTorch."""


def start(method: str, model: PreTrainedModel, train: TrainConfig, cut: Cut, clients: int) -> Round:
    """Prepare a method; `model` is the global model, which every round moves.

    Parameters
    ----------
    method : str
        One of `METHODS`.
    model : PreTrainedModel
        The unsplit model.
    train : TrainConfig
        Of `settings`.
    cut : Cut
        Where split methods cut.
    clients : int
        How many there are; all of them take part in every round.
    """
    if method == "fedavg":
        return lambda cohort, number: fed_avg_round(model, cohort, train, number, train.rounds)
    if method == "centralised":
        optimizer = plain_optimizer(model, train)

        def centralised(cohort: Cohort, number: int) -> None:
            centralised_round(model, cohort, train, number, train.rounds, optimizer=optimizer)

        return centralised
    return Federation(model, train, cut, clients).round


def settings(method: str, **values: object) -> TrainConfig:
    """The training settings of a method; `values` are those that all methods share."""
    strategy, _, sync = method.partition("-") if method.startswith("merged") else (method, "", "")
    own = {"strategy": strategy, "sync": sync} if sync else {"strategy": strategy}
    if method in SAME.values():
        own = {}
    return TrainConfig(**values, **own)  # type: ignore[arg-type]


class Federation:
    """Clients with ends of their own around one trunk engine, all in this process.

    Parameters
    ----------
    model : PreTrainedModel
        The global model: its trunk is the engine's, its ends are averaged into.
    train : TrainConfig
        The strategy, and what it needs.
    cut : Cut
        Where the model is cut.
    clients : int
        How many there are.
    """

    def __init__(self, model: PreTrainedModel, train: TrainConfig, cut: Cut, clients: int) -> None:
        self._train, self._parts = train, split(model, cut)
        trunk = self._parts.trunk
        self._engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=train)
        self._ends = [_ends(model, cut) for _ in range(clients)]
        if train.sync == "step":
            self._engine.policy.start_ends(self._state())

    def round(self, cohort: Cohort, number: int) -> None:
        """Train all clients for one round and average what they trained, by tokens."""
        train, engine = self._train, self._engine
        engine.open_round(number, train.rounds, training=True, cohort=len(cohort))
        state, links = self._state(), []
        for client, (steps, ends) in enumerate(zip(cohort, self._ends, strict=True)):
            load_client_state(*ends, state)
            links.append(
                LocalLink(engine.open(str(client), client=f"client-{client}", steps=len(steps)))
            )
        tokens = self._run(cohort, links, number)
        fold(engine, {str(client): count for client, count in enumerate(tokens)})
        mean = weighted_mean([client_state(*ends) for ends in self._ends], tokens)
        load_client_state(self._parts.bottom, self._parts.top, mean)

    def _run(self, cohort: Cohort, links: Sequence[LocalLink], number: int) -> list[int]:
        """Run all clients in the order that the strategy is about; returns their tokens."""
        if self._train.strategy == "splitfed-v2":
            return self._take_turns(cohort, links, number)

        def run(client: int) -> int:
            steps, place = cohort[client], self._place(client, number)
            outcome = streamed.train(
                *self._ends[client], links[client], steps, len(steps), self._train, place
            )
            links[client].close()
            return outcome.tokens

        together = len(cohort) if self._train.strategy == "merged" else 1
        with ThreadPoolExecutor(together) as pool:
            return list(pool.map(run, range(len(cohort))))

    def _take_turns(self, cohort: Cohort, links: Sequence[LocalLink], number: int) -> list[int]:
        """Client 0's first step, client 1's first step, ...: one order, so that runs repeat."""
        trainers = [
            streamed.Trainer(
                *self._ends[client],
                links[client],
                len(steps),
                self._train,
                self._place(client, number),
            )
            for client, steps in enumerate(cohort)
        ]
        tokens = [0] * len(cohort)
        for step in range(max(len(steps) for steps in cohort)):
            for client, steps in enumerate(cohort):
                if step < len(steps):
                    tokens[client] += trainers[client].step(step, steps[step])[1]
        return tokens

    def _place(self, client: int, number: int) -> Place:
        return Place(seed=0, client=f"client-{client}", round=number, rounds=self._train.rounds)

    def _state(self) -> dict[str, Tensor]:
        return client_state(self._parts.bottom, self._parts.top)


def _ends(model: PreTrainedModel, cut: Cut) -> tuple[Part, Part]:
    parts = split(copy.deepcopy(model), cut)
    return parts.bottom, parts.top
