"""What a run leaves: one folder with its configuration, metrics, summary, plot and model.

Lines are printed, not logged: Flower forwards what a ServerApp prints to `flwr run --stream`, while
its root logger drops everything below a warning.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from conf.load import to_yaml
from conf.schema import Config
from flower_app.runs import checkpoint
from flower_app.runs.folders import (
    FAILED,
    FINISHED,
    RunLock,
    find_last_run,
    folders,
    new_folder,
    runs_folder,
)
from flower_app.runs.journal import Journal, cut_back, replace_whole
from flower_app.runs.lines import adapted_line, finished_line, perplexity, round_line, step_line
from flower_app.runs.plots import plot_loss
from flower_app.runs.resume import Point
from strategies.events import Event, StepDone, Turnout

logger = logging.getLogger(__name__)

__all__ = ["Recorder", "find_last_run"]


class Recorder:
    """Writes a run folder while the run goes on, and tells the console about it.

    Steps may be recorded from several threads.

    Parameters
    ----------
    config : Config
        The resolved configuration.
    folder : Path, optional
        The run folder; by default a new one under `output.folder`.
    say : callable, optional
        Takes one line for the console.
    point : Point, optional
        Where a run goes on: in its own folder, with its records up to there. The folder stays as
        it is until `take_up`.
    """

    def __init__(
        self,
        config: Config,
        folder: Path | None = None,
        say: Callable[[str], None] | None = None,
        point: Point | None = None,
    ) -> None:
        self.config, self.say = config, say or _print
        if point is not None:
            folder = point.run
        self.folder = (
            folder or new_folder(runs_folder(config.output.folder), config.experiment)
        ).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._alone = point.lock if point is not None and point.lock else RunLock(self.folder)
        self._lock = threading.Lock()
        self._rounds: list[dict[str, Any]] = []
        self._resumed: list[int] = []
        self._adapted: dict[str, float] = {}
        self._point = point
        self._begin(*(("", 0.0) if point is None else (point.started, point.seconds)))
        if point is None:
            self._open()

    def start(self) -> None:
        """Print where the run goes."""
        self._clock = time.monotonic()
        self.say(f"run folder: {self.folder}")
        if self._point is not None:
            self.say(f"going on after round {self._point.number} of {self.config.train.rounds}")

    def take_up(self) -> None:
        """Bring a resumed run's folder back to where it goes on; nothing for a new run.

        What was there after that point is lost then, so call it when nothing can fail any more that
        could have been tried before.
        """
        if self._point is None:
            return
        point = self._point
        self._cut_back(point)
        self._point = None
        self._open()
        self._resumed.append(point.number)
        self._journal.write(
            _dumps({"kind": "resume", "round": point.number, "time": _now().isoformat()})
        )

    def adapted(self, shares: Mapping[str, float]) -> None:
        """Say which share of each part has an adapter, in [0, 1]; the summary tells it too."""
        self._adapted = dict(shares)
        if shares:
            self.say(adapted_line(shares))

    @property
    def started(self) -> str:
        """When the run began, at first."""
        return self._started

    @property
    def seconds(self) -> float:
        """What the run has taken so far, that of a resumed one before it was stopped too."""
        return self._before + time.monotonic() - self._clock

    def sync(self) -> None:
        """Have all records on the disk, or raise OSError."""
        with self._lock:
            self._journal.sync()

    def _begin(self, started: str, before: float) -> None:
        self._started, self._before = started or _now().isoformat(), before
        self._clock = time.monotonic()

    def _open(self) -> None:
        replace_whole(self.folder / "config.yaml", to_yaml(self.config))
        self._journal = Journal(self.folder / "metrics.jsonl", self.say)
        self._empty = not self._rounds

    def _cut_back(self, point: Point) -> None:
        records = cut_back(self.folder / "metrics.jsonl", point.number)
        self._rounds = [record for record in records if record["kind"] == "round"]
        self._resumed = [record["round"] for record in records if record["kind"] == "resume"]
        (self.folder / "summary.json").unlink(missing_ok=True)
        checkpoint.clean(self.folder)
        for number, path in folders(self.folder):
            if number > point.number:
                checkpoint.remove(path)

    def __call__(self, event: Event) -> None:
        """Record what the strategy tells."""
        if isinstance(event, StepDone):
            self.step(**vars(event))
            return
        first = event.training or event.evaluation or Turnout()
        later = event.evaluation if event.training else None
        self.round(
            round=event.round,
            train=event.train,
            evaluate=event.evaluate,
            asked=first.asked,
            clients=first.clients,
            missing=first.missing,
            tokens=event.tokens,
            bytes_up=event.bytes_up,
            bytes_down=event.bytes_down,
            seconds=event.seconds,
            evaluation=vars(later) if later else None,
            attempts=len(event.abandoned) + 1,
            abandoned=[vars(turnout) for turnout in event.abandoned],
        )

    def step(
        self,
        *,
        round: int,
        client: str,
        step: int,
        steps: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        bytes_up: int,
        bytes_down: int,
        seconds: Mapping[str, float],
        attempt: int = 1,
    ) -> None:
        """Record one optimizer step of one client.

        Parameters
        ----------
        round, step, steps : int
            Round (from 1), step within it (from 1), and how many steps the client takes in it.
        client : str
            Name of the client.
        loss, grad_norm, lr : float
            Mean loss per token, gradient norm before clipping, learning rate.
        tokens : int
            Tokens that counted in the loss.
        bytes_up, bytes_down : int
            Bytes from the client to the trunk and back.
        seconds : mapping
            Time in `bottom`, `network`, `trunk` and `top`.
        attempt : int
            Which attempt at the round it belongs to. Those before the round's last one were undone.
        """
        record: dict[str, Any] = {
            "kind": "step",
            "round": round,
            "client": client,
            "step": step,
            "steps": steps,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "bytes_up": bytes_up,
            "bytes_down": bytes_down,
            "seconds": dict(seconds),
        }
        if attempt > 1:
            record["attempt"] = attempt
        every = max(1, self.config.output.log_every)
        line = ""
        if step % every == 0 or step == steps:
            line = step_line(record, self.config.train.rounds)
        self._write(record, line)

    def round(
        self,
        *,
        round: int,
        train: Mapping[str, Any] | None,
        evaluate: Mapping[str, Any] | None,
        asked: Iterable[str],
        clients: Iterable[str],
        missing: Mapping[str, str],
        tokens: int,
        bytes_up: int,
        bytes_down: int,
        seconds: float,
        evaluation: Mapping[str, Any] | None = None,
        attempts: int = 1,
        abandoned: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        """Record one round; round 0 is the evaluation before training.

        Parameters
        ----------
        round : int
            The round.
        train, evaluate : mapping or None
            Metrics over all clients, weighted by tokens; `loss` is the mean per token.
        asked, clients : iterable of str
            Names of the clients that were asked to train, and of those whose answers were used; in
            round 0, to evaluate.
        missing : mapping
            Name and reason of each client that was asked and dropped.
        tokens : int
            Tokens trained on in this round.
        bytes_up, bytes_down : int
            Bytes from all clients to the trunk and back.
        seconds : float
            Duration of the round.
        evaluation : mapping, optional
            `asked`, `clients` and `missing` of the evaluation after training.
        attempts : int
            How often the round was tried. What it holds besides `abandoned` is the last attempt's.
        abandoned : iterable of mapping
            `asked`, `clients` and `missing` of each attempt without quorum.
        """
        record: dict[str, Any] = {
            "kind": "round",
            "round": round,
            "train": None if train is None else dict(train),
            "evaluate": None if evaluate is None else dict(evaluate),
            "asked": sorted(asked),
            "clients": sorted(clients),
            "missing": dict(missing),
            "tokens": tokens,
            "bytes_up": bytes_up,
            "bytes_down": bytes_down,
            "seconds": seconds,
        }
        if evaluation is not None:
            record["evaluation"] = dict(evaluation)
        if attempts > 1:
            record |= {"attempts": attempts, "abandoned": [dict(turnout) for turnout in abandoned]}
        self._rounds.append(record)
        self._write(record, round_line(record, self.config.train.rounds))

    def finish(self, model_folder: str | Path | None = None) -> dict[str, Any]:
        """Write the summary and the plot, and print where everything is.

        Parameters
        ----------
        model_folder : path, optional
            Where the final model was saved.

        Returns
        -------
        dict
            The summary.
        """
        summary = self._summary(FINISHED)
        summary["model"] = None if model_folder is None else str(Path(model_folder).resolve())
        try:
            self._close(summary)
        except OSError as error:
            raise RuntimeError(
                f"the run is complete, but its records cannot be written to {self.folder}: "
                f"{error.strerror or error}; free space and resume it "
                f"(`graft resume {self.folder}`), which repeats only what is missing"
            ) from error
        self.say(finished_line(summary))
        self.say(f"run folder: {self.folder}")
        return summary

    def fail(self, error: BaseException | str) -> dict[str, Any]:
        """Write a summary that says why the run ended early.

        A resumed run that was not taken up leaves its folder as it was.

        Parameters
        ----------
        error : exception or str
            What went wrong.

        Returns
        -------
        dict
            The summary.
        """
        summary = self._summary(FAILED)
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        summary["error"] = text
        if self._point is not None:
            self._alone.release()
            self.say(f"failed: {text}")
            self.say(f"not resumed, and nothing was changed in {self.folder}")
            return summary
        try:
            self._close(summary)
        except OSError as problem:  # what ended the run is what must be told
            logger.warning("%s cannot be written: %s", self.folder, problem.strerror or problem)
        self.say(f"failed: {text}")
        self.say(f"run folder: {self.folder}")
        return summary

    def _summary(self, status: str) -> dict[str, Any]:
        trained = [record for record in self._rounds if record["round"] > 0]
        evaluated: list[float | None] = [(r["evaluate"] or {}).get("loss") for r in self._rounds]
        losses = [loss for loss in evaluated if loss is not None]
        tokens = sum(record["tokens"] for record in trained)
        seconds = self.seconds
        missing = last_missing(self._rounds)
        dropped = times_dropped(self._rounds)
        return {
            "status": status,
            "experiment": self.config.experiment,
            "rounds": len(trained),
            "clients": len({name for record in self._rounds for name in record["clients"]}),
            "strategy": self.config.train.strategy,
            "eval_loss_first": losses[0] if losses else None,
            "eval_loss_last": losses[-1] if losses else None,
            "eval_perplexity_last": perplexity(losses[-1]) if losses else None,
            "tokens": tokens,
            "bytes_up": sum(record["bytes_up"] for record in self._rounds),
            "bytes_down": sum(record["bytes_down"] for record in self._rounds),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 3) if seconds else 0.0,
            "started": self._started,
            "finished": _now().isoformat(),
            **({"adapted": self._adapted} if self._adapted else {}),
            **({"resumed": self._resumed} if self._resumed else {}),
            **({"missing": missing} if missing else {}),
            **({"dropped": dropped} if dropped else {}),
        }

    def _write(self, record: dict[str, Any], line: str) -> None:
        with self._lock:
            self._journal.write(_dumps(record))
            self._empty = False
            if line:
                self.say(line)

    def _close(self, summary: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._journal.close()
            replace_whole(self.folder / "summary.json", _dumps(summary, indent=2) + "\n")
            self._draw()
        finally:
            self._alone.release()

    def _draw(self) -> None:
        if self._empty:
            return
        try:
            plot_loss(self.folder)
        except OSError as error:
            logger.warning(
                "loss.png cannot be written: %s; `graft plot %s` draws it again",
                error.strerror or error,
                self.folder.name,
            )


def turnouts(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return who was asked, answered and was dropped, for all that a round asked.

    Parameters
    ----------
    record : mapping
        A round, as in `metrics.jsonl`.

    Returns
    -------
    list of mapping
        Abandoned attempts, training, evaluation.
    """
    evaluation = record.get("evaluation")
    return [*record.get("abandoned", ()), record, *([evaluation] if evaluation else [])]


def times_dropped(rounds: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how often each client was asked in vain, the most often first.

    Parameters
    ----------
    rounds : iterable of mapping
        Rounds, as in `metrics.jsonl`.

    Returns
    -------
    dict
        Names and counts, those not needed included: whoever is always too slow never counts.
    """
    names = (
        name for record in rounds for turnout in turnouts(record) for name in turnout["missing"]
    )
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def last_missing(rounds: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return who was missing in the last round, and why.

    Parameters
    ----------
    rounds : sequence of mapping
        Rounds, as in `metrics.jsonl`.

    Returns
    -------
    dict
        Names and reasons; training's before the evaluation's.
    """
    if not rounds:
        return {}
    last = rounds[-1]
    return {**(last.get("evaluation") or {}).get("missing", {}), **last["missing"]}


def _dumps(record: Any, indent: int | None = None) -> str:
    """Return strict JSON; a number that is not finite becomes null."""
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _now() -> datetime:
    return datetime.now().astimezone()


def _print(line: str) -> None:
    print(line, flush=True)
