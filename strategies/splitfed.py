"""SplitFed as a Flower Strategy: the control plane of a run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from logging import INFO
from typing import Any, Protocol

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log
from torch import Tensor

from conf.load import to_json
from conf.schema import Config
from strategies.aggregation import weighted_mean
from strategies.answers import (
    ARRAYS,
    CONFIG,
    OUTCOME,
    TICKET,
    Answer,
    from_arrays,
    mismatches,
    read_answer,
    to_arrays,
)
from strategies.optim import derive_seed
from strategies.transport.service import StepReport, TrunkService
from strategies.trunk import TrunkEngine


class Observer(Protocol):
    """Who is told of the run's progress."""

    @property
    def step(self) -> Callable[..., None]:
        """Called with the fields of an applied optimizer step."""

    @property
    def round(self) -> Callable[..., None]:
        """Called with the fields of an ended round; round 0 is the evaluation before training."""


@dataclass(kw_only=True)
class _Tally:
    """A round as it will be reported."""

    started: float = field(default_factory=time.monotonic)
    clients: set[str] = field(default_factory=set)
    missing: dict[str, str] = field(default_factory=dict)
    train: dict[str, float] | None = None
    evaluate: dict[str, float] | None = None
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class SplitFed(Strategy):
    """Federated split learning: clients keep bottom and top, the server keeps the trunk.

    `configure_train` samples the cohort, opens the round on the trunk and sends each client the
    averaged bottom/top tensors with a session ticket. `aggregate_train` averages what came back by
    tokens, folds the trunk as its policy says, and names who was missing.

    Parameters
    ----------
    engine : TrunkEngine
        The trunk and its policy.
    service : TrunkService
        The engine's data plane, started.
    config : Config
        The run's configuration, which travels to the clients.
    observer : Observer
        Told of every step and round.
    model : str
        What the trunk was cut from, in words; a client with another model refuses to train.

    Raises
    ------
    RuntimeError
        From a round in which no client finished, with every client's reason.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        service: TrunkService,
        config: Config,
        observer: Observer,
        *,
        model: str = "",
    ) -> None:
        self.model = model
        self.engine, self.service, self.config, self.observer = engine, service, config, observer
        self._rounds = config.train.rounds
        self._sampled: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._sent: dict[str, Tensor] = {}
        self._tally = _Tally()

    def summary(self) -> None:
        """Log what the strategy will do."""
        train, federation = self.config.train, self.config.federation
        log(INFO, "\t├──> Trunk: %s at %s", train.strategy, self.service.address)
        log(
            INFO,
            "\t└──> Sampling: train %.2f | evaluate %.2f | at least %d clients",
            federation.fraction_train,
            federation.fraction_evaluate,
            federation.min_clients,
        )

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """Evaluate before training, then run all rounds; see `flwr.serverapp.strategy.Strategy`."""
        timeout = kwargs.get("timeout", self.config.federation.round_timeout)
        messages = self.configure_evaluate(0, initial_arrays, ConfigRecord(), grid)
        self.aggregate_evaluate(0, grid.send_and_receive(messages, timeout=timeout))
        return super().start(grid, initial_arrays, *args, **kwargs)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a training round and make a message with a ticket for each client of the cohort."""
        self._tally = _Tally()
        self._sent = from_arrays(arrays)
        nodes = self._sample(grid, server_round, self.config.federation.fraction_train)
        return self._open(server_round, arrays, nodes, training=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients' tensors and the trunk by the tokens each client trained on."""
        answers = self._collect(replies, self._train_error)
        odd = mismatches(answers, self._sent)
        for answer in answers:
            if answer.key in odd:
                self._tally.missing[answer.client] = odd[answer.key]
        answers = [answer for answer in answers if answer.key not in odd]
        self._tally.clients = {answer.client for answer in answers}
        weights = {answer.key: answer.metrics["num-tokens"] for answer in answers}
        self.service.end_round()
        self.engine.close_round(weights)
        if not answers:
            raise RuntimeError(self._nobody(server_round, "training"))
        mean = weighted_mean([answer.state for answer in answers], list(weights.values()))
        metrics = self._fold(answers)
        self._tally.train, self._tally.tokens = metrics, int(metrics["num-tokens"])
        return to_arrays(mean), MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a forward-only round; no messages if nothing is held out or evaluated."""
        if server_round == 0:
            self._tally = _Tally()
        self._sampled = {}
        if self.config.federation.fraction_evaluate == 0 or self.config.data.heldout == 0:
            return []
        nodes = self._sample(grid, server_round, self.config.federation.fraction_evaluate)
        return self._open(server_round, arrays, nodes, training=False)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean held-out loss over all tokens of all clients; reports the round."""
        metrics = None
        if self._sampled:
            answers = self._collect(replies, lambda answer: "")
            if server_round == 0:
                self._tally.clients = {answer.client for answer in answers}
            self.service.end_round()
            self.engine.close_round({})
            if not answers:
                raise RuntimeError(self._nobody(server_round, "evaluation"))
            metrics = self._tally.evaluate = self._fold(answers)
        self._report(server_round)
        return MetricRecord(dict(metrics)) if metrics else None

    def on_step(self, report: StepReport) -> None:
        """Pass a step from the data plane to the observer, with the round it belongs to."""
        record = {**vars(report), "round": int(report.key.split("-")[1]), "step": report.step + 1}
        del record["key"]
        self.observer.step(**record)

    def _sample(self, grid: Grid, server_round: int, fraction: float) -> list[int]:
        """Draw the cohort by clients' names, so that it is alike in every run of the same seed."""
        least = self.config.federation.min_clients
        waited = 0
        while len(nodes := list(grid.get_node_ids())) < least:
            if waited % 10 == 0:
                text = "waiting for clients: %d connected, federation.min_clients=%d required"
                log(INFO, text, len(nodes), least)
            time.sleep(1)
            waited += 1
        count = min(len(nodes), max(least, round(fraction * len(nodes))))
        if count == len(nodes):
            return sorted(nodes)
        self._learn_names(grid, nodes)
        nodes.sort(key=lambda node: (self._name(node), node))
        seed = derive_seed(self.config.seed, server_round, "sample")
        return sorted(random.Random(seed).sample(nodes, count))

    def _learn_names(self, grid: Grid, nodes: Sequence[int]) -> None:
        """Ask clients for their names: Flower's node ids differ in every run, names do not."""
        unknown = [node for node in nodes if node not in self._names]
        questions = [Message(RecordDict(), node, MessageType.QUERY) for node in unknown]
        timeout = self.config.federation.round_timeout
        for reply in grid.send_and_receive(questions, timeout=timeout) if questions else ():
            outcome = {} if reply.has_error() else reply.content.config_records.get(OUTCOME, {})
            if "client" in outcome:
                self._names[reply.metadata.src_node_id] = str(outcome["client"])

    def _open(
        self, server_round: int, arrays: ArrayRecord, nodes: Sequence[int], *, training: bool
    ) -> list[Message]:
        self.engine.open_round(server_round, self._rounds, training=training)
        purpose = "train" if training else "evaluate"
        self._sampled = {node: f"{purpose}-{server_round}-{node}" for node in nodes}
        shared = ConfigRecord({"json": to_json(self.config)})
        return [
            Message(
                content=RecordDict(
                    {ARRAYS: arrays, CONFIG: shared, TICKET: self._ticket(server_round, key)}
                ),
                message_type=MessageType.TRAIN if training else MessageType.EVALUATE,
                dst_node_id=node,
            )
            for node, key in self._sampled.items()
        ]

    def _ticket(self, server_round: int, key: str) -> ConfigRecord:
        return ConfigRecord(
            {
                "address": self.service.address,
                "token": self.service.admit(key),
                "certificate": self.service.certificate,
                "model": self.model,
                "round": server_round,
                "rounds": self._rounds,
            }
        )

    def _collect(self, replies: Iterable[Message], check: Callable[[Answer], str]) -> list[Answer]:
        """The answers that hold, in the order of client names; the tally learns who is missing."""
        waiting = dict(self._sampled)
        answers = []
        for reply in replies:
            node = reply.metadata.src_node_id
            key = waiting.pop(node, None)
            if key is None:
                continue
            answer = read_answer(key, reply, self._name(node))
            if error := answer.error or check(answer):
                self._tally.missing[answer.client] = error
            else:
                self._names[node] = answer.client
                answers.append(answer)
        limit = self.config.federation.round_timeout
        for node in waiting:
            self._tally.missing[self._name(node)] = (
                f"no answer within federation.round_timeout={limit:g} s"
            )
        return sorted(answers, key=lambda answer: (answer.client, answer.key))

    def _name(self, node: int) -> str:
        return self._names.get(node, f"node {node}")

    def _train_error(self, answer: Answer) -> str:
        """Why an answer's tokens cannot be its weight: the trunk has applied steps of others."""
        seen, told = self.engine.session_tokens(answer.key), answer.metrics["num-tokens"]
        if told == seen:
            return ""
        return f"it reports {told:g} trained tokens, the trunk has applied steps of {seen}"

    def _fold(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Sum counters and weight the loss by tokens."""
        tokens = sum(answer.metrics["num-tokens"] for answer in answers)
        loss = sum(a.metrics["loss"] * a.metrics["num-tokens"] for a in answers) / tokens
        self._tally.bytes_up += int(sum(answer.metrics["bytes-up"] for answer in answers))
        self._tally.bytes_down += int(sum(answer.metrics["bytes-down"] for answer in answers))
        return {"loss": loss, "num-tokens": tokens, "clients": len(answers)}

    def _nobody(self, server_round: int, what: str) -> str:
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(self._tally.missing.items()))
        return f"no client finished {what} in round {server_round}: {reasons}"

    def _report(self, server_round: int) -> None:
        tally = self._tally
        self.observer.round(
            round=server_round,
            train=tally.train,
            evaluate=tally.evaluate,
            clients=sorted(tally.clients),
            missing=tally.missing,
            tokens=tally.tokens,
            bytes_up=tally.bytes_up,
            bytes_down=tally.bytes_down,
            seconds=time.monotonic() - tally.started,
        )
