"""SplitFed as a Flower Strategy: the control plane of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import INFO
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log

from conf.schema import Config
from models import Cut
from strategies.aggregate.joint import JointModel
from strategies.engine.engine import TrunkEngine
from strategies.events import Observer, RoundTrained, Stopped
from strategies.records import Form
from strategies.rounds.answers import Profile, is_keyless, join
from strategies.rounds.attempt import Attempt, Run
from strategies.rounds.local import LocalEnds
from strategies.rounds.losses import Losses
from strategies.rounds.roster import Roster, bounds_of, needs_first_tensors
from strategies.rounds.sampling import draw, draw_again, needed, sizes
from strategies.rounds.tally import Tally, step_done
from strategies.transport.conversation import StepReport
from strategies.transport.plane import Plane

logger = logging.getLogger(__name__)


class Keep(Protocol):
    """Who may keep the run's state between two rounds."""

    def __call__(self, number: int, strategy: SplitFed, *, last: bool) -> None:
        """Called when round `number` is trained, and again when its evaluation is reported.

        May ask for `state_dict()`. `last`: the run stops here, whatever was planned.
        """


class SplitFed(Strategy):
    """Federated split learning: clients keep bottom and top, the server keeps the trunk.

    `configure_train` draws the cohort, opens the round on the trunk and sends each client the
    averaged bottom/top tensors with a session ticket. `aggregate_train` averages what came back by
    tokens, folds the trunk as its policy says, and names who was missing. A round whose quorum
    fails is undone and tried again with a cohort drawn anew. An evaluation that fails is reported
    as missing: it undoes nothing.

    Parameters
    ----------
    engine : TrunkEngine
        The trunk, a `models.Part`, and its policy.
    plane : Plane
        Serves the engine, started.
    config : Config
        The run's configuration, which travels to the clients.
    observer : callable
        Told of every step and round, as `strategies.events`.
    form : callable
        Names and shapes of what a client of a cut and a rank trains, and must answer.
    model : str
        What the trunk was cut from, in words; a client with another model refuses to train.
    keep : Keep, optional
        Called after every round.
    central : callable, optional
        Evaluates the whole model on a file of the server's, given what `arrays_for` gives a
        client; None if that gave no number.

    Raises
    ------
    RuntimeError
        From a round without quorum and retries, with every client's reason.
    """

    def __init__(
        self,
        engine: TrunkEngine,
        plane: Plane,
        config: Config,
        observer: Observer,
        *,
        form: Callable[[Cut, int], Form],
        model: str = "",
        keep: Keep | None = None,
        central: Callable[[ArrayRecord], Mapping[str, float] | None] | None = None,
    ) -> None:
        self.local = None if config.aggregation.ends == "average" else LocalEnds()
        self.joint = JointModel(engine, config)
        self._run = Run(engine, plane, config, model, form, observer, self.joint.told, self.local)
        self.config, self._observer, self._keep = config, observer, keep
        self._central, self.losses = central, Losses(config.train.patience)
        self.roster = Roster(config, bounds_of(engine))
        self._rounds = config.train.rounds
        self.done = 0
        self._known: list[str] = []
        self._should_stop: Callable[[], bool] = bool  # which is False: nobody asks
        self._stop: Stopped | None = None
        self._attempt: Attempt | None = None
        self._tally, self._unevaluated = Tally(number=-1), False

    def summary(self) -> None:
        """Log what the strategy will do."""
        train, federation = self.config.train, self.config.federation
        log(INFO, "\t├──> Trunk: %s at %s", train.strategy, self._run.plane.address)
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
        should_stop: Callable[[], bool] | None = None,
    ) -> Result:
        """Evaluate before training, then run all rounds; those that are left after a `resume`.

        Flower's own loop waits for every reply and cannot try a round again. `timeout` is not
        read: `federation.round_timeout` is. `should_stop` is asked between rounds.
        """
        self._rounds = num_rounds
        self._should_stop = should_stop or bool
        self.summary()
        result, arrays = Result(arrays=initial_arrays), initial_arrays
        if self.done:
            arrays = result.arrays = self.joint.arrays_for()
            if self.done < num_rounds:
                self.roster.compare(grid, self._known)
            if self._unevaluated and (metrics := self._finish(self.done, arrays, grid)):
                result.evaluate_metrics_clientapp[self.done] = metrics
            self._stop = self.losses.stops(self.done, num_rounds)
        else:
            self._begin(arrays, grid)
        for number in range(self.done + 1, num_rounds + 1):
            if self._stop is not None:
                self._observer(self._stop)
                break
            arrays, result.train_metrics_clientapp[number] = self._train(number, arrays, grid)
            result.arrays = arrays
            self.done = number
            self._set_down(number)
            if metrics := self._finish(number, arrays, grid):
                result.evaluate_metrics_clientapp[number] = metrics
        return result

    def state_dict(self) -> dict[str, Any]:
        """All that later rounds depend on, between two rounds; shares memory with what moves.

        There are no generators in it and no places in the data: every random number is drawn from
        a seed made of the run's, the round and what it is for (`derive_seed`), the order of a
        client's examples too.
        """
        return {
            "engine": self._run.engine.state_dict(),
            "joint": self.joint.state_dict(),
            "names": self.roster.names,
            "unevaluated": self._tally.state_dict() if self._unevaluated else None,
            "losses": self.losses.state_dict(),
            "local": local.state_dict() if (local := self.local) else None,
        }

    def resume(self, number: int, state: Mapping[str, Any], clients: Sequence[str] = ()) -> None:
        """Go on after round `number`.

        Parameters
        ----------
        number : int
            The last round that is trained. If its evaluation is due, it comes first.
        state : mapping
            What `state_dict` returned after it.
        clients : sequence of str
            Who was connected then; it is said if others are now.

        Raises
        ------
        ValueError
            If the state is not of this model and configuration.
        """
        self._run.engine.load_state_dict(state["engine"])
        self.joint.load_state_dict(state["joint"])
        masked = self.joint.masked
        self.roster.keep(state.get("names", {}), masked.check if masked is not None else b"")
        if told := state.get("unevaluated"):
            self._tally = Tally.from_state(told)
        self._unevaluated = bool(told)
        self.losses.load_state_dict(state.get("losses", {"losses": {}}))
        if self.local is not None:
            self.local.load_state_dict(state["local"])
        self.done, self._known = number, sorted(clients)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a training round and make a message with a ticket for each client of the cohort."""
        if self._tally.number != server_round:
            self._tally = Tally(number=server_round)
        tally, present = self._tally, self.roster.gather(grid)
        lost = tally.abandoned[-1].missing if tally.abandoned else {}
        cohort, count = draw_again(self.config, present, server_round, tally.attempt, lost)
        return self._open(server_round, cohort, count, training=True)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the clients' tensors and the trunk by the tokens each client trained on.

        Without quorum the round is undone, and both are None: it can be configured again.
        """
        assert self._attempt is not None
        answers, cohort = self._attempt.collect(replies), self._attempt.cohort
        replicas, statistics = self._run.engine.collect([answer.key for answer in answers])
        if len(answers) < needed(cohort.count, self.config):
            self._attempt.give_up(self._tally)
            return None, None
        report = self.joint.update(server_round, join(answers, replicas))
        metrics = self._tally.fold(answers, "train") | statistics
        if report.lora_error is not None:
            metrics["lora-error"] = report.lora_error
        self._tally.note(report.anomalies)
        self._tally.note(self._run.engine.policy.anomalies())
        self._tally.training, self._tally.train = cohort.turnout, metrics
        self._tally.tokens = int(metrics["num-tokens"])
        if self.local is not None:
            self.local.count(server_round, (answer.client for answer in answers))
        return self.joint.arrays_for(), MetricRecord(dict(metrics))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a forward-only round; no messages if nothing is held out, or nobody is there."""
        if self._tally.number != server_round:
            self._tally = Tally(number=server_round)
        self._attempt, federation = None, self.config.federation
        if not self._evaluates:
            return []
        try:
            present = self.roster.gather(grid)
        except RuntimeError as error:
            logger.warning("round %d is not evaluated: %s", server_round, error)
            return []
        count, _ = sizes(len(present), federation.fraction_evaluate, federation)
        cohort = draw(self.config, present, count, server_round)
        return self._open(server_round, cohort, count, training=False)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Mean held-out loss over all tokens of all clients; None if no client has one."""
        if self._attempt is None:
            return None
        answers = self._attempt.collect(replies)
        self._run.engine.close_round()
        self._tally.evaluation = turnout = self._attempt.cohort.turnout
        if not answers:
            text = "round %d is not evaluated: %s. Training goes on without (data.heldout=0 or "
            text += "federation.fraction_evaluate=0 asks nobody to evaluate)"
            logger.warning(text, server_round, turnout.reasons())
            return None
        self._tally.evaluate = metrics = self._tally.fold(answers, "evaluate")
        return MetricRecord(dict(metrics))

    def on_step(self, report: StepReport) -> None:
        """Pass a step from the data plane to the observer, with the round it belongs to."""
        self._observer(step_done(report))

    def _begin(self, arrays: ArrayRecord, grid: Grid) -> None:
        """Round 0: what the model can before training."""
        if needs_first_tensors(self.config):
            first = self.roster.first_tensors(grid, self._run.model, self._run.form)
            self.joint.start(first)
        self._evaluate(0, arrays, grid)
        self._judge(0)
        self._observer(self._tally.event())

    def _train(
        self, number: int, arrays: ArrayRecord, grid: Grid
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Train one round, as often as it takes or may."""
        while True:
            messages = self.configure_train(number, arrays, ConfigRecord(), grid)
            mean, metrics = self.aggregate_train(number, self._exchange(messages, grid))
            if mean is not None and metrics is not None:
                return mean, metrics

    def _evaluate(self, number: int, arrays: ArrayRecord, grid: Grid) -> MetricRecord | None:
        messages = self.configure_evaluate(number, arrays, ConfigRecord(), grid)
        return self.aggregate_evaluate(number, self._exchange(messages, grid))

    @property
    def _evaluates(self) -> bool:
        return self.config.federation.fraction_evaluate > 0 and self.config.data.heldout > 0

    def _set_down(self, number: int) -> None:
        """Record and keep a round that was trained, before it is evaluated."""
        if self._evaluates:
            self._unevaluated = True
            self._observer(RoundTrained(so_far=self._tally.event()))
            if self._keep is not None:
                self._keep(number, self, last=False)

    def _finish(self, number: int, arrays: ArrayRecord, grid: Grid) -> MetricRecord | None:
        """Evaluate a round that was trained, report it and keep what it came to."""
        try:
            metrics = self._evaluate(number, arrays, grid)
            self._judge(number)
        finally:
            self._observer(self._tally.event())
        self._unevaluated = False
        self._stop = self.losses.stops(number, self._rounds, self._should_stop)
        if self._keep is not None:
            self._keep(number, self, last=self._stop is not None)
        return metrics

    def _judge(self, number: int) -> None:
        """Evaluate on the server's own file, if there is one, and take note of the loss."""
        tally = self._tally
        if self._central is not None:
            tally.central = self._central(self.joint.arrays_for())
        told = tally.evaluate if self._central is None else tally.central
        if self.losses.add(number, (told or {}).get("loss")) and self.local is not None:
            self.local.better()

    def _open(
        self, number: int, cohort: Sequence[Profile], count: int, *, training: bool
    ) -> list[Message]:
        attempt = Attempt(
            self._run, number, self._rounds, self._tally.attempt, cohort, count, training=training
        )
        self._attempt = attempt
        return attempt.open(self.joint.arrays_for)

    def _exchange(self, messages: Iterable[Message], grid: Grid) -> Iterator[Message]:
        """One reply for each message. A node that lost its key is asked anew who it is."""
        if self._attempt is None:
            return
        for reply in self._attempt.exchange(grid, messages):
            if is_keyless(reply):
                self.roster.forget(reply.metadata.src_node_id)
            yield reply
