"""Sampling: what Optuna is told, who is ended early, and that a search goes on after a kill."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from conf.rules import ConfigError
from simulations.sweep import execute
from simulations.sweep.search import FILE, plan_search
from simulations.sweep.spec import Spec, read_spec
from simulations.sweep.state import (
    CRASHED,
    FINISHED,
    PRUNED,
    RUNNING,
    STOPPED,
    read_sweep,
    sweeps_folder,
    write_sweep,
)
from simulations.sweep.sweep import Room, begin, go_on
from simulations.sweep.task import Ended, Task
from tests.simulations.sweep.made import Pretended, make_run, undrawn

ONE = Room(jobs=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "POLL_SECONDS", 0.01)
    undrawn(monkeypatch)


def _spec(*changes: str, points: int) -> Spec:
    from dataclasses import replace

    return replace(read_spec("demo", changes), search=points)


def _study(folder: Path) -> Any:
    storage = JournalStorage(JournalFileBackend(str(folder / FILE)))
    return optuna.load_study(study_name="demo", storage=storage)


def _folder() -> Path:
    (folder,) = sweeps_folder().iterdir()
    return folder


def test_samples_lie_in_their_spans_and_their_losses_are_told() -> None:
    said: list[str] = []
    spec = _spec("train.lr=interval(1e-4,1e-2)", "train.batch_size=interval(2,6)",
                 "cut.bottom=1,2", points=5)  # fmt: skip
    sweep = begin(spec, ONE, runner=Pretended(crash=["003"]), say=said.append)
    assert [point.status for point in sweep.points].count(FINISHED) == 4
    for point in sweep.points:
        assert 1e-4 <= point.values["train.lr"] <= 1e-2
        assert point.values["train.batch_size"] in (2, 3, 4, 5, 6)
        assert point.values["cut.bottom"] in (1, 2)
    assert len({point.values["train.lr"] for point in sweep.points}) == 5
    trials = _study(_folder()).trials
    for point, trial in zip(sweep.points, trials, strict=True):
        if point.status == CRASHED:
            assert trial.state == TrialState.FAIL
        else:  # the pretended loss of the last round
            assert trial.value == pytest.approx(3.0 - point.values["train.lr"])
            assert trial.params["train.lr"] == pytest.approx(point.values["train.lr"], rel=1e-5)
    assert "train.lr: sampled by the logarithm from 0.0001 to 0.01" in said
    assert "train.batch_size: sampled evenly from 2 to 6" in said


class _Slow:
    """Says round after round; from the seventh point on with losses that are hopeless."""

    def __init__(self) -> None:
        self.halted: list[str] = []

    def __call__(self, task: Task) -> Ended:
        bad = int(task.point.id) > 6
        run = make_run([5.0, 4.0 + bad, 3.9 + bad, 3.8 + bad], status="" if bad else "finished")
        task.say(f"run folder: {run}")
        if not bad:
            return Ended(status=FINISHED)
        time.sleep(0.1)  # until the folder is known
        task.say("round 1/3 | held-out loss 5.0 (perplexity 1)")
        if task.halted.wait(5):
            self.halted.append(task.point.id)
            return Ended(status=STOPPED)
        return Ended(status=FINISHED)


def test_a_hopeless_point_is_ended_early_and_another_takes_its_place() -> None:
    runner = _Slow()
    spec = _spec("train.lr=interval(1e-4,1e-2)", "train.rounds=3", points=7)
    sweep = begin(spec, ONE, runner=runner, say=print)
    assert runner.halted == ["007"]
    assert [point.status for point in sweep.points] == [FINISHED] * 6 + [PRUNED]
    states = [trial.state for trial in _study(_folder()).trials]
    assert states == [TrialState.COMPLETE] * 6 + [TrialState.PRUNED]
    assert "1 point ended early" in (_folder() / "table.md").read_text()


def test_without_a_pruner_nobody_is_ended_early() -> None:
    points = 6

    def quick(task: Task) -> Ended:
        task.say(f"run folder: {make_run([5.0, float(task.point.id), 9.0])}")
        time.sleep(0.03)
        task.say("round 1/3 | held-out loss 9.0 (perplexity 1)")
        time.sleep(0.03)
        return Ended(status=STOPPED if task.halted.is_set() else FINISHED)

    spec = _spec("train.lr=interval(1e-4,1e-2)", "train.rounds=3", points=points)
    sweep = begin(spec, ONE, pruner="none", runner=quick, say=print)
    assert sweep.count(FINISHED) == points


def test_a_killed_search_goes_on_where_it_was() -> None:
    spec = _spec("train.lr=interval(1e-4,1e-2)", points=3)
    begin(spec, ONE, runner=Pretended(), say=print)
    folder = _folder()
    sweep = read_sweep(folder)
    # As a kill leaves it: two more are wanted, of which one was under way, another only proposed.
    sweep.search["points"] = 6
    study = _study(folder)
    under_way, proposed = study.ask(), study.ask()
    for trial in (under_way, proposed):
        trial.suggest_float("train.lr", 1e-4, 1e-2, log=True)
    sweep.points.append(read_sweep(folder).points[0])
    sweep.points[3].id, sweep.points[3].status, sweep.points[3].run = "004", RUNNING, ""
    write_sweep(folder, sweep)

    runner = Pretended()
    done = go_on(folder.name, ONE, runner=runner, say=print)
    assert runner.ran == ["004", "006", "007"]
    assert done.count(FINISHED) == 6
    states = {trial.number: trial.state for trial in _study(folder).trials}
    assert states == {
        0: TrialState.COMPLETE, 1: TrialState.COMPLETE, 2: TrialState.COMPLETE,
        3: TrialState.COMPLETE, 4: TrialState.FAIL, 5: TrialState.COMPLETE, 6: TrialState.COMPLETE,
    }  # fmt: skip


def test_a_point_that_ended_just_before_a_kill_is_made_known() -> None:
    begin(_spec("train.lr=interval(1e-4,1e-2)", points=2), ONE, runner=Pretended(), say=print)
    folder = _folder()
    sweep, study = read_sweep(folder), _study(folder)
    trial = study.ask()
    trial.suggest_float("train.lr", 1e-4, 1e-2, log=True)
    sweep.points.append(read_sweep(folder).points[1])
    sweep.points[2].id = "003"  # finished, and the study does not know
    write_sweep(folder, sweep)
    go_on(folder.name, ONE, runner=Pretended(), say=print)
    known = _study(folder).trials[2]
    assert known.state == TrialState.COMPLETE
    assert known.value == pytest.approx(3.0 - sweep.points[2].values["train.lr"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.lr=interval(-1,1)"], "train.lr must be a positive number"),
        (["lora.dropout=interval(0.1,1.5)"], r"lora.dropout must be a number in \[0, 1\)"),
        (["cut.bottom=interval(1,9)"], "split leaves no trunk"),
        (["train.rounds=interval(1.5,3)"], "train.rounds must be a whole number"),
        (["train.lr=interval(1e-4,1e-2)", "seed=0,1"], "one seed"),
        (["train.lr=1e-3"], "nothing to search"),
        (["train.lr=1e-3,2e-3", "data.heldout=0"], "goes by the held-out loss"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_search(_spec(*changes, points=3), "median", "", print)


def test_without_optuna_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name)
    )
    with pytest.raises(ConfigError, match=r"pip install 'graft\[search\]'"):
        plan_search(_spec("train.lr=1e-3,2e-3", points=3), "median", "", print)


def test_settings_that_may_not_be_together_cost_a_point_and_no_more() -> None:
    spec = _spec("cut.bottom=1,4", "cut.top=1,4", points=8)  # the demo has six blocks
    sweep = begin(spec, ONE, runner=Pretended(), say=print)
    crashed = [point for point in sweep.points if point.status == CRASHED]
    assert (sweep.count(FINISHED), len(crashed)) == (3, 1)  # each of the four settings once
    for point in crashed:
        assert (point.values["cut.bottom"], point.values["cut.top"]) == (4, 4)
        assert "split leaves no trunk" in point.error
