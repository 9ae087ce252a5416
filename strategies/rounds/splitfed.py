"""SplitFed as a Flower Strategy: the control plane of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from conf.load import to_json
from conf.schema import Config
from models import Cut
from strategies.aggregate.joint import JointModel
from strategies.aggregate.state import Contribution
from strategies.engine.engine import TrunkEngine
from strategies.events import Observer, StepDone
from strategies.mail import exchange
from strategies.records import ARRAYS, CONFIG, KEY_LOST, TICKET
from strategies.rounds.answers import Answer, error_of
from strategies.rounds.cohort import Cohort
from strategies.rounds.roster import Profile, Roster, draw_batches, quorum, sizes
from strategies.rounds.tally import Tally
from strategies.transport.messages import Lockstep
from strategies.transport.stream.service import Broken, StepReport, TrunkService
from strategies.transport.tickets import Guest

logger = logging.getLogger(__name__)


class Keep(Protocol):
    """Who may keep the run's state between two rounds."""

    def __call__(self, number: int, strategy: SplitFed) -> None:
        """Called when round `number` is over and reported; may ask for `state_dict()`."""


def needs_first_tensors(config: Config) -> bool:
    """Whether the server must know what the clients start from: not for plain averaging."""
    return config.train.sync == "step" or config.aggregation.optimizer != "fedavg"


class SplitFed(Strategy):
    """Federated split learning: clients keep bottom and top, the server keeps the trunk.

    `configure_train` draws the cohort, opens the round on the trunk and sends each client the
    averaged bottom/top tensors with a session ticket. `aggregate_train` averages what came back by
    tokens, folds the trunk as its policy says, and names who was missing. A round whose quorum
    fails is undone and tried again with a cohort drawn anew.

    Parameters
    ----------
    engine : TrunkEngine
        The trunk and its policy.
    service : TrunkService or Lockstep
        The engine's data plane, started: streams, or Flower's messages.
    config : Config
        The run's configuration, which travels to the clients.
    observer : callable
        Told of every step and round, as `strategies.events`.
    model : str
        What the trunk was cut from, in words; a client with another model refuses to train.
    keep : Keep, optional
        Called after every round.

    Raises
    ------
    RuntimeError
        From a round without quorum and retries, with every client's reason.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        service: TrunkService | Lockstep,
        config: Config,
        observer: Observer,
        *,
        model: str = "",
        keep: Keep | None = None,
    ) -> None:
        self.model, self._keep = model, keep
        self.engine, self.service, self.config, self.observer = engine, service, config, observer
        self.roster = Roster(config)
        self.joint = JointModel(engine, config)
        self._rounds = config.train.rounds
        self._done = 0
        self._known: list[str] = []
        self._grid: Grid | None = None
        self._cohort = Cohort()
        self._tally = Tally(number=-1)

    def summary(self) -> None:
        """Log what the strategy will do."""
        train, federation = self.config.train, self.config.federation
        log(INFO, "\t├──> Trunk: %s at %s", train.strategy, self.service.address)
        log(
            INFO,
            "\t└──> Sampling: %s | train %.2f | evaluate %.2f | at least %d clients",
            federation.sampling,
            federation.fraction_train,
            federation.fraction_evaluate,
            federation.min_clients,
        )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600.0,
    ) -> Result:
        """Evaluate before training, then run all rounds; those that are left after a `resume`.

        Flower's own loop waits for every reply and cannot try a round again. `timeout` is not
        read: `federation.round_timeout` is.
        """
        self._grid, self._rounds = grid, num_rounds
        self.summary()
        result, arrays = Result(arrays=initial_arrays), initial_arrays
        if self._done:
            arrays = result.arrays = self.joint.arrays_for()
            if self._done < num_rounds:
                self._compare_clients(grid)
        else:
            if needs_first_tensors(self.config):
                self._start_joint(grid)
            self._evaluate(0, arrays, grid)
        for number in range(self._done + 1, num_rounds + 1):
            arrays, result.train_metrics_clientapp[number] = self._train(number, arrays, grid)
            result.arrays = arrays
            if metrics := self._evaluate(number, arrays, grid):
                result.evaluate_metrics_clientapp[number] = metrics
            if self._keep is not None:
                self._keep(number, self)
        return result

    def state_dict(self) -> dict[str, Any]:
        """All that later rounds depend on, between two rounds; shares memory with what moves.

        There are no generators in it and no places in the data: every random number is drawn from
        a seed made of the run's, the round and what it is for (`derive_seed`), the order of a
        client's examples too.
        """
        return {"engine": self.engine.state_dict(), "joint": self.joint.state_dict()}

    def resume(self, number: int, state: Mapping[str, Any], clients: Sequence[str] = ()) -> None:
        """Go on after round `number`.

        Parameters
        ----------
        number : int
            The last round that is over.
        state : mapping
            What `state_dict` returned after it.
        clients : sequence of str
            Who was connected then; it is said if others are now.

        Raises
        ------
        ValueError
            If the state is not of this model and configuration.
        """
        self.engine.load_state_dict(state["engine"])
        self.joint.load_state_dict(state["joint"])
        self._done, self._known = number, sorted(clients)

    @property
    def held_out_loss(self) -> float | None:
        """Of the last round; None if nobody evaluated."""
        return (self._tally.evaluate or {}).get("loss")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a training round and make a message with a ticket for each client of the cohort."""
        if self._tally.number != server_round:
            self._tally = Tally(number=server_round)
        federation, tally = self.config.federation, self._tally
        present = self.roster.gather(grid)
        count, asked = sizes(len(present), federation.fraction_train, federation)
        lost = tally.abandoned[-1].missing if tally.abandoned else {}
        # Those who were just lost are asked again only if a round needs them.
        asked = max(count, min(asked, len([p for p in present if p.client not in lost])))
        cohort = self.roster.draw(present, asked, server_round, tally.attempt, avoid=lost)
        return self._open(server_round, cohort, count, training=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients' tensors and the trunk by the tokens each client trained on.

        Without quorum the round is undone, and both are None: it can be configured again.
        """
        cohort, tally = self._cohort, self._tally
        answers = cohort.collect(replies, self._train_error)
        self.service.end_round()
        replicas, statistics = self.engine.collect([answer.key for answer in answers])
        contributions: list[Contribution] = []
        if answers:
            contributions, odd = self.joint.contributions(answers, replicas)
            answers = cohort.drop(odd)
        if len(answers) < quorum(cohort.count, self.config.federation.quorum):
            self._give_up(server_round)
            return None, None
        error = self.joint.update(server_round, contributions)
        metrics = self._fold(answers) | statistics
        if error is not None:
            metrics["lora-error"] = error
        tally.training, tally.train = cohort.turnout, metrics
        tally.tokens = int(metrics["num-tokens"])
        return self.joint.arrays_for(), MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a forward-only round; no messages if nothing is held out or evaluated."""
        if self._tally.number != server_round:
            self._tally = Tally(number=server_round)
        self._cohort, federation = Cohort(), self.config.federation
        if federation.fraction_evaluate == 0 or self.config.data.heldout == 0:
            return []
        present = self.roster.gather(grid)
        count, _ = sizes(len(present), federation.fraction_evaluate, federation)
        cohort = self.roster.draw(present, count, server_round)
        return self._open(server_round, cohort, count, training=False)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean held-out loss over all tokens of all clients; reports the round."""
        metrics = None
        if self._cohort.profiles:
            answers, turnout = self._cohort.collect(replies), self._cohort.turnout
            self.service.end_round()
            self.engine.close_round()
            if not answers:
                raise RuntimeError(
                    f"no client finished evaluation in round {server_round}: {turnout.reasons()}"
                )
            metrics = self._tally.evaluate = self._fold(answers)
            self._tally.evaluation = turnout
        self.observer(self._tally.event())
        return MetricRecord(dict(metrics)) if metrics else None

    def on_step(self, report: StepReport) -> None:
        """Pass a step from the data plane to the observer, with the round it belongs to.

        Steps of a round's second attempt say so: they take the place of the first one's.
        """
        number, attempt = map(int, report.key.split("-")[1].split("."))
        told = {**vars(report), "round": number, "attempt": attempt, "step": report.step + 1}
        del told["key"]
        self.observer(StepDone(**told))

    def _train(
        self, number: int, arrays: ArrayRecord, grid: Grid
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Train one round, as often as it takes or may."""
        while True:
            messages = self.configure_train(number, arrays, ConfigRecord(), grid)
            mean, metrics = self.aggregate_train(
                number, self._exchange(messages, self._cohort.enough)
            )
            if mean is not None and metrics is not None:
                return mean, metrics

    def _evaluate(self, number: int, arrays: ArrayRecord, grid: Grid) -> MetricRecord | None:
        messages = self.configure_evaluate(number, arrays, ConfigRecord(), grid)
        return self.aggregate_evaluate(number, self._exchange(messages, self._cohort.enough))

    def _exchange(
        self, messages: Iterable[Message], enough: Callable[[], bool]
    ) -> Iterable[Message]:
        """Bring messages to the clients and yield one reply for each; see `replies.exchange`."""
        for reply in self._replies(messages, enough):
            key = self._cohort.keys.get(reply.metadata.src_node_id, "")
            if not self.engine.has(key) and (reply.has_error() or error_of(reply)):
                self.engine.miss()  # so that `merged` does not wait for it
            if KEY_LOST in error_of(reply):
                self.roster.forget(reply.metadata.src_node_id)
            yield reply

    def _replies(
        self, messages: Iterable[Message], enough: Callable[[], bool]
    ) -> Iterable[Message]:
        assert self._grid is not None
        federation = self.config.federation
        if isinstance(self.service, Lockstep):
            return self.service.exchange(
                self._grid,
                list(messages),
                self._cohort.keys,
                timeout=federation.round_timeout,
                enough=enough,
            )
        return exchange(
            self._grid,
            list(messages),
            timeout=federation.round_timeout,
            enough=enough,
            broken=self._broken,
            lost_after=self.config.link.grace,
        )

    def _broken(self, node: int) -> Broken | None:
        assert isinstance(self.service, TrunkService)
        return self.service.broken(self._cohort.keys[node])

    def _open(
        self,
        number: int,
        cohort: Sequence[Profile],
        count: int,
        *,
        training: bool,
    ) -> list[Message]:
        drawn: dict[str, list[int]] = {}
        if training and self.config.train.global_batch:
            drawn = draw_batches(cohort, self.config.train, self.config.seed, number)
            # Whoever gives nothing to any step is not asked.
            cohort = [profile for profile in cohort if any(drawn[profile.client])]
            count = min(count, len(cohort))
        self.engine.open_round(
            number,
            self._rounds,
            training=training,
            cohort=len(cohort),
            revocable=training and self.config.federation.retries > 0,
        )
        purpose = "train" if training else "evaluate"
        stem = f"{purpose}-{number}.{self._tally.attempt}"
        self._cohort = Cohort(cohort, count, stem)
        shared = ConfigRecord({"json": to_json(self.config)})
        return [
            Message(
                content=RecordDict(
                    {
                        ARRAYS: self.joint.arrays_for(profile),
                        CONFIG: shared,
                        TICKET: self._ticket(number, profile, drawn.get(profile.client)),
                    }
                ),
                message_type=MessageType.TRAIN if training else MessageType.EVALUATE,
                dst_node_id=profile.node,
            )
            for profile in cohort
        ]

    def _ticket(
        self, number: int, profile: Profile, sizes: list[int] | None = None
    ) -> ConfigRecord:
        cut = Cut(bottom=profile.bottom, top=profile.top)
        usual = Cut(bottom=self.config.cut.bottom, top=self.config.cut.top)
        guest = Guest(
            key=self._cohort.keys[profile.node],
            client=profile.client,
            public_key=profile.public_key,
            cut=None if cut == usual else cut,
        )
        ticket = ConfigRecord(
            {
                **self.service.ticket(guest).as_record(),
                "model": self.model,
                "round": number,
                "rounds": self._rounds,
            }
        )
        if sizes is not None:
            ticket["batch-sizes"] = sizes
        return ticket

    def _compare_clients(self, grid: Grid) -> None:
        """Say so if the clients are not those of the run before."""
        now = [profile.client for profile in self.roster.gather(grid)]
        if self._known and now != self._known:
            logger.warning(
                "the clients differ from those of the run before: missing %s; new %s. The run goes "
                "on with those who are here, and will not equal one that was never stopped; to "
                "wait for all, resume with federation.min_clients=%d",
                ", ".join(sorted({*self._known} - {*now})) or "none",
                ", ".join(sorted({*now} - {*self._known})) or "none",
                len(self._known),
            )

    def _start_joint(self, grid: Grid) -> None:
        """Learn the clients' first tensors from one of them; all start alike."""
        usual = (self.config.cut.bottom, self.config.cut.top)
        present = self.roster.gather(grid)
        # One with the run's own cut has all that the trunk has not.
        present.sort(key=lambda profile: ((profile.bottom, profile.top) != usual, profile.client))
        ends = self.roster.first_tensors(grid, present, self.model)
        self.joint.start(ends)
        self.engine.policy.start_ends(ends)

    def _train_error(self, answer: Answer) -> str:
        """Why an answer cannot be averaged: its tokens are its weight."""
        seen, told = self.engine.session_tokens(answer.key), answer.metrics["num-tokens"]
        if told != seen:
            return f"it reports {told:g} trained tokens, the trunk has applied steps of {seen}"
        return ""

    def _fold(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Sum counters and weight the loss by tokens."""
        tokens = sum(answer.metrics["num-tokens"] for answer in answers)
        loss = sum(a.metrics["loss"] * a.metrics["num-tokens"] for a in answers) / tokens
        self._tally.bytes_up += int(sum(answer.metrics["bytes-up"] for answer in answers))
        self._tally.bytes_down += int(sum(answer.metrics["bytes-down"] for answer in answers))
        return {"loss": loss, "num-tokens": tokens, "clients": len(answers)}

    def _give_up(self, number: int) -> None:
        """Undo a training round without quorum; `RuntimeError` if it may not be tried again."""
        turnout, tally, federation = self._cohort.turnout, self._tally, self.config.federation
        if turnout.clients:
            needed = quorum(self._cohort.count, federation.quorum)
            text = (
                f"round {number} has no quorum: federation.quorum={federation.quorum:g} of "
                f"{self._cohort.count} clients is {needed}, {len(turnout.clients)} answered "
                f"({', '.join(turnout.clients)}); {turnout.reasons()}"
            )
        else:
            text = f"no client finished training in round {number}: {turnout.reasons()}"
        if tally.attempt > federation.retries:
            self.engine.close_round()
            again = f" (attempt {tally.attempt} of {tally.attempt})" if federation.retries else ""
            raise RuntimeError(f"{text}{again}")
        self.engine.abandon_round()
        tally.abandoned.append(turnout)
        logger.warning("%s. Attempt %d of %d follows", text, tally.attempt, federation.retries + 1)
