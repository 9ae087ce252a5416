"""A sweep's state: what runs at a time, what a crash or a kill leaves, and how it goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flower_app.runs.folders import runs_folder
from simulations.sweep import execute
from simulations.sweep.execute import Execution, Listed
from simulations.sweep.limits import Limits, find_limits, read_memory_limit
from simulations.sweep.progress import Lines
from simulations.sweep.spec import read_spec
from simulations.sweep.state import (
    CRASHED,
    FINISHED,
    PENDING,
    RUNNING,
    STOPPED,
    Point,
    Sweep,
    find_sweep,
    lock_sweep,
    read_sweep,
    sweeps_folder,
    write_sweep,
)
from simulations.sweep.sweep import Room, begin, dry_run, go_on
from simulations.sweep.task import Ended, Task
from tests.simulations.sweep.made import Pretended, make_point, make_run, make_sweep, undrawn

ONE, ROOMY = Room(jobs=1), Limits(jobs=0, cores=8, memory_mb=1000.0)
SPEC = ["train.lr=1e-3,3e-3", "seed=0,1", "train.rounds=2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "POLL_SECONDS", 0.01)


def _execute(
    folder: Path, sweep: Sweep, runner: Callable[[Task], Ended], limits: Limits = ROOMY, **more: Any
) -> list[str]:
    said: list[str] = []
    write_sweep(folder, sweep)
    Execution(
        folder=folder, sweep=sweep, runner=runner, source=Listed(sweep.points), limits=limits,
        display=Lines(sweep, len(sweep.points), said.append), **more,
    ).run()  # fmt: skip
    return said


def test_a_sweep_begins_crashes_in_part_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, said = Pretended(crash=["002"]), list[str]()
    sweep = begin(read_spec("demo", SPEC), ONE, say=said.append, runner=runner)
    assert runner.ran == ["001", "002", "003", "004"]
    assert [point.status for point in sweep.points] == [FINISHED, CRASHED, FINISHED, FINISHED]
    assert sweep.points[1].error == "no such luck"
    folder = Path(said[0].removeprefix("sweep folder: ") if "folder" in said[0] else said[1])
    (folder,) = sweeps_folder().iterdir()
    assert "no such luck" in (folder / "logs" / "002.log").read_text()
    for name in ("results.csv", "results.parquet", "table.md", "loss.png", "sweep.json"):
        assert (folder / name).stat().st_size > 100
    assert any("--retry-failed" in line for line in said)
    assert any("1 point crashed" in line for line in said)
    assert read_sweep(folder) == sweep

    undrawn(monkeypatch)
    again = Pretended()
    go_on(folder.name, ONE, runner=again, say=said.append)
    assert again.ran == []  # a crash is not tried again unasked
    done = go_on(str(folder), ONE, retry=True, runner=again, say=said.append)
    assert again.ran == ["002"]
    assert done.count(FINISHED) == 4
    assert done.points[1].error == ""


def test_points_of_a_killed_sweep_are_run_and_finished_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undrawn(monkeypatch)
    points = [make_point(number, train__lr=number / 1000) for number in range(1, 6)]
    sweep = make_sweep(points)
    for point, status in zip(points, (FINISHED, RUNNING, PENDING, CRASHED, STOPPED), strict=True):
        point.status = status
    folder = sweeps_folder() / "killed"
    folder.mkdir(parents=True)
    write_sweep(folder, sweep)
    runner = Pretended()
    go_on("killed", ONE, runner=runner, say=print)
    assert runner.ran == ["002", "003", "005"]


def test_the_second_waits_until_the_first_has_shown_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [make_point(number, train__lr=number / 1000) for number in range(1, 8)]
    at_once, most, lock = 0, 0, threading.Lock()
    first_has_trained = threading.Event()
    started_early = []
    monkeypatch.setattr(execute, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(execute, "measure", lambda task: 300.0)

    def runner(task: Task) -> Ended:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        if task.point.id == "001":
            time.sleep(0.15)
            first_has_trained.set()
            task.say("round 1/2 | held-out loss 3.1 (perplexity 22)")
            time.sleep(0.2)
        else:
            started_early.extend([] if first_has_trained.is_set() else [task.point.id])
            time.sleep(0.1)
        with lock:
            at_once -= 1
        return Ended(status=FINISHED)

    _execute(tmp_path, make_sweep(points), runner)
    assert started_early == []
    assert most == 3  # 1000 MB hold three of 300
    assert {point.peak_mb for point in points} == {300.0}


@pytest.mark.parametrize(
    ("limits", "running", "peak", "admitted"),
    [
        (Limits(jobs=0, cores=4, memory_mb=1000), 0, 0.0, True),
        (Limits(jobs=0, cores=4, memory_mb=1000), 0, 5000.0, True),  # alone, come what may
        (Limits(jobs=0, cores=4, memory_mb=1000), 1, 0.0, False),  # nothing measured yet
        (Limits(jobs=0, cores=4, memory_mb=1000), 1, 400.0, True),
        (Limits(jobs=0, cores=4, memory_mb=1000), 2, 400.0, False),
        (Limits(jobs=0, cores=3, memory_mb=1000), 1, 10.0, False),  # two cores each
        (Limits(jobs=2, cores=1, memory_mb=1), 1, 0.0, True),  # as the user said
        (Limits(jobs=2, cores=9, memory_mb=9), 2, 0.0, False),
    ],
)
def test_limits(limits: Limits, running: int, peak: float, admitted: bool, tmp_path: Path) -> None:
    tasks = [Task(make_point(number), tmp_path / "log") for number in range(1, running + 1)]
    need = {f"{number:03d}": 2 for number in range(1, 10)}
    assert limits.admit(tasks, need, "009", peak) is admitted


def test_limits_are_the_machines_unless_said(tmp_path: Path) -> None:
    assert find_limits(2, 3, 1.5) == Limits(jobs=2, cores=3, memory_mb=1536.0)
    assert find_limits().cores >= 1
    assert read_memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert read_memory_limit(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert read_memory_limit(tmp_path) is None


def test_a_signal_stops_what_runs_and_says_how_to_go_on(tmp_path: Path) -> None:
    points = [make_point(number, train__lr=number / 1000) for number in range(1, 4)]
    sweep = make_sweep(points)

    def runner(task: Task) -> Ended:
        if task.point.id == "001":
            return Ended(status=FINISHED)
        task.say("run folder: /somewhere")
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert task.halted.wait(20)
        return Ended(status=STOPPED)

    with pytest.raises(KeyboardInterrupt):
        _execute(tmp_path, sweep, runner, Limits(jobs=1, cores=1, memory_mb=1))
    left = read_sweep(tmp_path)
    assert [point.status for point in left.points] == [FINISHED, STOPPED, PENDING]
    assert left.points[1].run == "/somewhere"


def test_what_a_kill_would_find_says_what_is_running_and_where(tmp_path: Path) -> None:
    """The state is on the disk before the run is over: kill -9 leaves nothing unsaid."""
    points = [make_point(1, train__lr=1e-3), make_point(2, train__lr=2e-3)]
    seen: list[Point] = []

    def runner(task: Task) -> Ended:
        task.say("Successfully started run 77")
        task.say("run folder: /runs/a")
        end = time.monotonic() + 20
        while read_sweep(tmp_path).points[0].run_id != "77" and time.monotonic() < end:
            time.sleep(0.01)
        seen.extend(read_sweep(tmp_path).points)
        return Ended(status=FINISHED)

    _execute(tmp_path, make_sweep(points), runner, Limits(jobs=1, cores=1, memory_mb=1))
    assert (seen[0].status, seen[0].run, seen[0].run_id) == (RUNNING, "/runs/a", "77")
    assert seen[1].status == PENDING
    assert [(each.status, each.seconds >= 0) for each in points] == [(FINISHED, True)] * 2


def test_one_process_at_a_time_runs_a_sweep(tmp_path: Path) -> None:
    write_sweep(tmp_path, make_sweep([make_point(1)]))
    lock = lock_sweep(tmp_path)
    with pytest.raises(ValueError, match="being run by another process"):
        go_on(str(tmp_path), ONE, runner=Pretended())
    lock.release()


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no sweep"):
        find_sweep(str(tmp_path))
    (tmp_path / "sweep.json").write_text('{"name": 3}')
    with pytest.raises(ValueError, match="cannot be read"):
        read_sweep(tmp_path)


def test_a_sweep_is_found_by_its_folder_or_its_name_the_newest_first() -> None:
    for stamp in ("20260101-000000", "20260102-000000"):
        folder = sweeps_folder() / f"{stamp}-made"
        folder.mkdir(parents=True)
        write_sweep(folder, make_sweep([make_point(1)]))
    assert find_sweep("made").name == "20260102-000000-made"
    assert find_sweep("20260101-000000-made").name == "20260101-000000-made"


def test_a_dry_run_lists_points_and_estimates_by_earlier_runs() -> None:
    said: list[str] = []
    spec = read_spec("demo", ["train.local_steps=10,20", "train.rounds=2"])
    dry_run(spec, ONE, say=said.append)
    assert said[-1].startswith("2 points of experiment demo; no estimate")
    assert not sweeps_folder().exists()

    from conf.load import load_config, to_yaml

    before = make_run([5.0, 4.0, 3.0])  # 30 s and 3 MB
    (before / "config.yaml").write_text(to_yaml(load_config("demo", spec_overrides(10))))
    said.clear()
    dry_run(spec, ONE, say=said.append)
    assert said[0].startswith("001  train.local_steps=10 seed=0 clients=2  30 s, 3.0 MB")
    assert said[1].startswith("002  train.local_steps=20 seed=0 clients=2  60 s, 6.0 MB")
    assert said[-1] == "in all 90 s, 1 at a time"
    assert runs_folder().exists()


def spec_overrides(steps: int) -> str:
    """As the first point of the dry run has them."""
    return f"train.local_steps={steps} train.rounds=2"


def test_the_time_left_is_that_of_the_points_left() -> None:
    points = [make_point(number, train__lr=number / 1000) for number in range(1, 5)]
    now = 0.0
    lines = Lines(make_sweep(points), 4, print, clock=lambda: now)
    assert lines.left() is None
    points[0].status, points[0].seconds = FINISHED, 100.0
    assert lines.left() == 300.0
    lines.started(Task(points[1], Path("log")))
    now = 40.0
    assert lines.left() == 260.0
    lines.tick([Task(points[1], Path("log")), Task(points[2], Path("log"))])
    assert lines.left() == 130.0  # two at a time
