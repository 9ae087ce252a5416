"""Where a point is run: simulated, on a SuperLink of its own, or on one that was named."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from flower_app.runs.folders import FINISHED as RUN_FINISHED
from flower_app.runs.folders import RunLock, newest_round, read_summary
from simulations.launch.local_flower import LocalFlower, Outcome, flower_env, local_superlink
from simulations.launch.processes import wait_until
from simulations.launch.run import RAY_LATE
from simulations.launch.watcher import MARK
from simulations.sweep.state import CRASHED, FINISHED, STOPPED
from simulations.sweep.task import Ended, Task

MOST_LETTERS = 400
"""Of an error in the state; all of it is in the log."""
LOCK_SECONDS = 60.0
"""How long what a killed sweep left may take to let go of a run folder."""


class Simulated:
    """Runs each point on a SuperLink of its own, with Ray, as `graft run` does.

    What ends with one point takes no other with it, and its memory is known apart.

    Parameters
    ----------
    experiment : str
        The sweep's.
    federation : callable
        Value of `--federation-config` for a task.
    """

    def __init__(self, experiment: str, federation: Callable[[Task], str]) -> None:
        self._experiment, self._federation = experiment, federation

    def __call__(self, task: Task) -> Ended:
        """Run a point to its end."""
        resume = resumable(task)
        if isinstance(resume, Ended):
            return resume
        with local_superlink() as flower:
            task.mark = flower.env[MARK]
            outcome = self._run(flower, task, resume)
            if not outcome.completed and any(RAY_LATE in line for line in outcome.lines):
                outcome = self._run(flower, task, resume)
        return judge(task, outcome)

    def _run(self, flower: LocalFlower, task: Task, resume: str) -> Outcome:
        return flower.run(
            self._experiment,
            overrides_of(task, resume),
            resume=resume,
            federation=self._federation(task),
            echo=task.say,
            started=task.waiting,
        )


class Deployed:
    """Runs points on a SuperLink of the user's Flower configuration.

    Parameters
    ----------
    experiment : str
        The sweep's.
    superlink : str
        The connection's name.
    folder : Path
        The sweep's folder: Flower's commands leave their files there.
    environment : mapping
        Of this process: `FLWR_HOME` says where the configuration is.
    """

    def __init__(
        self,
        experiment: str,
        superlink: str,
        folder: Path,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._experiment, self._superlink, self._folder = experiment, superlink, folder
        home = Path(environment.get("FLWR_HOME") or "~/.flwr").expanduser()
        self._env = flower_env(home)

    def flower(self, name: str = "") -> LocalFlower:
        """Return the way to the SuperLink, with a working folder for one point."""
        place = self._folder / "flower" / name
        place.mkdir(parents=True, exist_ok=True)
        return LocalFlower(home=place, env=self._env, superlink=self._superlink)

    def __call__(self, task: Task) -> Ended:
        """Run a point to its end; one that still goes on there is waited for."""
        flower = self.flower(task.point.id)
        task.stop = lambda: self._stop(flower, task)
        if self._goes_on(flower, task.point.run_id):
            task.run_id = task.point.run_id
            outcome = flower.follow(task.run_id, echo=task.say, started=task.waiting)
            return judge(task, outcome)
        resume = resumable(task)
        if isinstance(resume, Ended):
            return resume
        outcome = flower.run(
            self._experiment,
            overrides_of(task, resume),
            resume=resume,
            echo=task.say,
            started=task.waiting,
        )
        return judge(task, outcome)

    def _goes_on(self, flower: LocalFlower, run_id: str) -> bool:
        """Whether a run that an earlier try started has not ended; a SuperLink forgets, too."""
        if not run_id:
            return False
        try:
            return not flower.status(run_id)[0].startswith("finished")
        except (RuntimeError, LookupError, ValueError):
            return False

    def _stop(self, flower: LocalFlower, task: Task) -> None:
        if task.run_id:
            flower.flwr("stop", task.run_id, self._superlink)


def resumable(task: Task) -> str | Ended:
    """Return what a point's run goes on from, empty to begin anew; or how it has ended already."""
    folder = Path(task.point.run)
    if not task.point.run or not folder.is_dir():
        return ""
    wait_until(
        lambda: not _being_written(folder), seconds=LOCK_SECONDS, what=f"{folder} to be let go of"
    )
    if (read_summary(folder) or {}).get("status") == RUN_FINISHED:
        return Ended(status=FINISHED)
    if newest_round(folder) is None:
        return ""
    from flower_app.runs.resume import look_up  # with torch

    try:
        return str(look_up(str(folder)).source)
    except ValueError as error:
        task.say(f"begun anew, because its run cannot go on: {error}")
        return ""


def overrides_of(task: Task, resume: str) -> str:
    """Return the overrides of a run; a resumed one has its own configuration."""
    return "" if resume else shlex.join(task.point.overrides)


def judge(task: Task, outcome: Outcome) -> Ended:
    """Return how a point ended, by what Flower and the run folder say of it."""
    if outcome.completed:
        folder = Path(task.run) if task.run else None
        if folder is None or read_summary(folder) is None:
            return Ended(
                status=FINISHED,
                error=f"its run folder {task.run or '(not named)'} is not on this machine: the "
                "tables lack it until it is there",
            )
        stopped = (read_summary(folder) or {}).get("status") == "stopped"
        return Ended(status=STOPPED if stopped else FINISHED)
    if task.halted.is_set() or outcome.status == "finished:stopped":
        return Ended(status=STOPPED)
    told = (read_summary(Path(task.run)) or {}).get("error") if task.run else ""
    return Ended(status=CRASHED, error=_in_a_line(str(told or task.failure or outcome.details)))


def _being_written(folder: Path) -> bool:
    try:
        RunLock(folder).release()
    except ValueError:
        return True
    return False


def guarded(runner: Callable[[Task], Ended], task: Task) -> Ended:
    """Run a point; what prevents its run is the point's end, not the sweep's."""
    try:
        return runner(task)
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        if task.halted.is_set():
            return Ended(status=STOPPED)
        task.say(f"failed: {type(error).__name__}: {error}")
        return Ended(status=CRASHED, error=_in_a_line(str(error) or repr(error)))


def _in_a_line(text: str) -> str:
    """An error without line ends and the boxes that Flower draws around its own."""
    words = re.sub(r"[\s\u2500-\u257f]+", " ", text).strip()
    return words if len(words) <= MOST_LETTERS else f"{words[:MOST_LETTERS]} ..."
