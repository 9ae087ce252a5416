"""`graft sweep` on the command line: what it refuses, lists and ends with."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from simulations.cli.app import app
from simulations.sweep import sweep as tool
from simulations.sweep.state import FINISHED, sweeps_folder, write_sweep
from tests.simulations.sweep.made import Pretended, make_point, make_run, make_sweep


def _graft(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sweep", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "train.lrr=1,2"], "did you mean 'train.lr'"),
        (["demo", "train.lr=1e-3", "--jobs", "many"], "give auto, or a whole number"),
        (["demo", "train.lr=1e-3", "--jobs", "0"], "give auto, or a whole number"),
        (["cutt"], "did you mean 'cut'"),
        (["--resume", "nowhere"], "is no sweep"),
        (["--table", "nowhere"], "is no sweep"),
        (["--resume", "x", "--dry-run"], "--dry-run: only for a command that names"),
        (["--superlink", "office"], "--superlink: only for a command that names"),
        (["demo", "train.lr=1,2", "--retry-failed"], "--retry-failed: only for a command that has"),
        (["demo", "--resume", "x"], "--resume and a new sweep: give one of them"),
        (["demo", "clients=2,4", "--superlink", "office"], "number of clients is the SuperLink's"),
        (
            ["demo", "train.lr=interval(1e-3,1)", "--search", "2", "--pruner", "x"],
            "there are median",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_starts_nothing(arguments: list[str], words: str) -> None:
    code, output = _graft(*arguments)
    assert code == 2
    assert words in output
    assert not sweeps_folder().exists()


def test_without_arguments_it_says_what_there_is() -> None:
    point = make_point(1, train__lr=0.001)
    point.run, point.status = str(make_run([5.0, 4.0])), FINISHED
    folder = sweeps_folder() / "20260101-000000-made"
    folder.mkdir(parents=True)
    write_sweep(folder, make_sweep([point]))
    code, output = _graft()
    assert code == 0
    assert "  heterogeneity\n" in output
    assert "20260101-000000-made: 1 finished" in output
    code, output = _graft("--table", folder.name)
    assert code == 0
    assert Path(output.splitlines()[2]) == folder / "table.md"


def test_a_crashed_point_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Pretended(crash=["002"])
    monkeypatch.setattr(tool, "Simulated", lambda *arguments: runner)
    code, output = _graft("demo", "train.lr=1e-3,2e-3", "--jobs", "1")
    assert code == 1
    assert "1 of 2 points finished" in output
    runner = Pretended()
    (folder,) = sweeps_folder().iterdir()
    code, output = _graft("--resume", folder.name, "--retry-failed", "--jobs", "1")
    assert (code, runner.ran) == (0, ["002"])
    assert "2 of 2 points finished" in output
