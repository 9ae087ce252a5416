"""Where a point is run: what its run is told, and what is made of how it ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.load import load_config
from flower_app.runs.folders import RunLock
from simulations.launch.local_flower import COMPLETED, Outcome
from simulations.launch.run import RAY_LATE
from simulations.launch.watcher import MARK
from simulations.sweep import runner as tool
from simulations.sweep.limits import cores_needed, federation_of, measure
from simulations.sweep.runner import Deployed, Simulated, guarded, judge, resumable
from simulations.sweep.state import CRASHED, FINISHED, STOPPED
from simulations.sweep.task import Ended, Task
from tests.simulations.sweep.made import make_point, make_run


def _outcome(status: str = COMPLETED, details: str = "", lines: tuple[str, ...] = ()) -> Outcome:
    return Outcome(run_id="1", status=status, details=details, folder=None, lines=list(lines))


def _task(tmp_path: Path, run: str = "", run_id: str = "") -> Task:
    point = make_point(1, 3, train__lr=0.001)
    point.run, point.run_id = run, run_id
    return Task(point, tmp_path / "001.log")


class _Flower:
    """Answers as a LocalFlower, and remembers what it was asked."""

    def __init__(self, *outcomes: Outcome, going_on: bool = False) -> None:
        self.env = {MARK: "mark"}
        self.asked: list[tuple[str, Any]] = []
        self._outcomes, self._going_on = list(outcomes), going_on

    def run(self, experiment: str, overrides: str, **options: Any) -> Outcome:
        self.asked.append(("run", (experiment, overrides, options["resume"])))
        return self._outcomes.pop(0)

    def follow(self, run_id: str, **options: Any) -> Outcome:
        self.asked.append(("follow", run_id))
        return self._outcomes.pop(0)

    def status(self, run_id: str) -> tuple[str, str]:
        return ("running" if self._going_on else COMPLETED), ""


def _simulated(monkeypatch: pytest.MonkeyPatch, flower: _Flower) -> Simulated:
    @contextlib.contextmanager
    def superlink() -> Iterator[_Flower]:
        yield flower

    monkeypatch.setattr(tool, "local_superlink", superlink)
    return Simulated("demo", lambda task: "num-supernodes=2")


def test_a_new_point_is_begun_with_its_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower, task = _Flower(_outcome()), _task(tmp_path)
    task.say(f"run folder: {make_run([5.0, 4.0])}")
    assert _simulated(monkeypatch, flower)(task) == Ended(status=FINISHED)
    assert flower.asked == [("run", ("demo", "train.lr=0.001 seed=3", ""))]
    assert task.mark == "mark"


def test_ray_that_comes_too_late_is_forgiven_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = _outcome("finished:failed", "Simulation failed", (RAY_LATE,))
    flower = _Flower(late, late)
    ended = _simulated(monkeypatch, flower)(_task(tmp_path))
    assert (ended.status, len(flower.asked)) == (CRASHED, 2)


def test_a_run_that_ended_before_the_state_said_so_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower = _Flower()
    ended = _simulated(monkeypatch, flower)(_task(tmp_path, str(make_run([5.0, 4.0]))))
    assert (ended, flower.asked) == (Ended(status=FINISHED), [])


def test_a_run_without_a_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    assert resumable(_task(tmp_path, str(make_run([5.0], status="")))) == ""
    assert resumable(_task(tmp_path, "/nowhere")) == ""
    assert resumable(_task(tmp_path)) == ""


def test_a_damaged_checkpoint_is_told_in_the_log_and_the_run_begun_anew(tmp_path: Path) -> None:
    run = make_run([5.0, 4.0], status="")
    (run / "config.yaml").write_text("experiment: demo\n")
    (run / "checkpoints" / "round-0001").mkdir(parents=True)
    task = _task(tmp_path, str(run))
    assert resumable(task) == ""
    assert "begun anew, because its run cannot go on" in task.log.read_text()


def test_a_run_folder_that_is_still_being_written_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "LOCK_SECONDS", 0.3)
    run = make_run([5.0], status="")
    lock = RunLock(run)
    with pytest.raises(RuntimeError, match="to be let go of"):
        resumable(_task(tmp_path, str(run)))
    lock.release()
    assert resumable(_task(tmp_path, str(run))) == ""


def _deployed(tmp_path: Path, flower: _Flower) -> Deployed:
    class Here(Deployed):
        def flower(self, name: str = "") -> Any:
            return flower

    return Here("deployment", "office", tmp_path)


def test_a_run_that_goes_on_at_the_superlink_is_waited_for(tmp_path: Path) -> None:
    flower, task = _Flower(_outcome(), going_on=True), _task(tmp_path, run_id="77")
    task.run = str(make_run([5.0, 4.0]))
    assert _deployed(tmp_path, flower)(task) == Ended(status=FINISHED)
    assert flower.asked == [("follow", "77")]


def test_one_that_ended_there_is_begun_or_taken_up(tmp_path: Path) -> None:
    flower, task = _Flower(_outcome()), _task(tmp_path, run_id="77")
    task.say(f"run folder: {make_run([5.0, 4.0])}")
    assert _deployed(tmp_path, flower)(task).status == FINISHED
    assert flower.asked == [("run", ("deployment", "train.lr=0.001 seed=3", ""))]


def test_the_users_flower_configuration_leads_to_the_superlink(tmp_path: Path) -> None:
    place = Deployed("demo", "office", tmp_path, {"FLWR_HOME": "/home/me/flower"}).flower("001")
    assert place.env["FLWR_HOME"] == "/home/me/flower"
    assert (place.superlink, place.home) == ("office", tmp_path / "flower" / "001")


@pytest.mark.parametrize(
    ("outcome", "halted", "expected"),
    [
        (_outcome("finished:failed", "Simulation failed"), False, (CRASHED, "ValueError: no")),
        (_outcome("finished:stopped"), False, (STOPPED, "")),
        (_outcome("running"), True, (STOPPED, "")),
    ],
)
def test_how_a_point_ended(
    tmp_path: Path, outcome: Outcome, halted: bool, expected: tuple[str, str]
) -> None:
    task = _task(tmp_path)
    task.say("(ServerApp pid=7) failed: ValueError: no")
    if halted:
        task.halt()
    ended = judge(task, outcome)
    assert (ended.status, ended.error) == expected


def test_a_run_folder_elsewhere_is_said_to_be_so(tmp_path: Path) -> None:
    task = _task(tmp_path)
    task.say("run folder: /on/another/machine")
    ended = judge(task, _outcome())
    assert ended.status == FINISHED
    assert "/on/another/machine is not on this machine" in ended.error


def test_what_prevents_a_run_is_the_points_end(tmp_path: Path) -> None:
    def runner(task: Task) -> Ended:
        raise RuntimeError("no\n╭─ Error ──╮\n│ SuperLink │\n")

    task = _task(tmp_path)
    assert guarded(runner, task) == Ended(status=CRASHED, error="no Error SuperLink")
    assert "SuperLink" in task.log.read_text()
    task.halted.set()
    assert guarded(runner, task) == Ended(status=STOPPED)


def test_a_task_that_is_halted_ends_who_waits_for_the_run(tmp_path: Path) -> None:
    task = _task(tmp_path)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    task.waiting(first)
    task.halt()
    assert first.wait(10) != 0
    later = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    task.waiting(later)  # halted before it was started
    assert later.wait(10) != 0


def test_a_task_learns_from_the_lines_of_its_run(tmp_path: Path) -> None:
    task = _task(tmp_path)
    for line in (
        "Successfully started run 123",
        "(ServerApp pid=1) run folder: /runs/x",
        "before training | held-out loss 5.5 (perplexity 1)",
        "  round 1/3  client-0  step   10/40  loss 3.4",
        "round 2/3 | train loss 2.7 (perplexity 15) | held-out loss 2.5821 (perplexity 13.22)",
    ):
        task.say(line)
    assert (task.run_id, task.run, task.rounds, task.loss) == ("123", "/runs/x", 2, "2.5821")
    assert len(task.log.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("changes", "clients", "cores", "needed", "told"),
    [
        ("", 2, 4, 1, (4, 2)),
        ("", 8, 4, 1, (4, 4)),
        ("", 2, 1, 1, (1, 1)),
        ("train.strategy=merged", 4, 2, 4, (2, 4)),
        ("train.strategy=merged link.transport=messages", 4, 2, 1, (2, 2)),
        ("runtime.client_threads=2", 4, 4, 2, (4, 2)),
        ("runtime.trunk_threads=3", 4, 4, 3, (4, 4)),
        ("runtime.client_threads=0", 4, 4, 4, (4, 1)),
    ],
)
def test_cores_are_what_ray_is_given(
    changes: str, clients: int, cores: int, needed: int, told: tuple[int, int]
) -> None:
    config = load_config("demo", changes)
    assert cores_needed(config, clients, cores) == needed
    given, at_once = told
    assert federation_of(config, clients, given) == (
        f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={at_once}"
    )


def test_memory_is_that_of_the_processes_with_the_mark(tmp_path: Path) -> None:
    import os

    task = _task(tmp_path)
    assert measure(task) == 0.0
    task.mark = "sweep-test-mark"
    code = "x = bytearray(80_000_000); print('up', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {MARK: task.mark},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        assert 80 < measure(task) < 300
        child.communicate("\n")
    assert measure(task) == 0.0
