"""What `graft` shows: configurations, and runs in tables that survive a pipe."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from conf.schema import Config
from flower_app.runs.recorder import Recorder
from simulations.cli.app import app
from strategies.events import RoundDone, Turnout


def _graft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_config_prints_what_a_run_would_use() -> None:
    result = _graft("config", "demo", "train.lr=0.5", "cut.bottom=2")
    assert result.exit_code == 0
    assert "lr: 0.5" in result.output
    assert "bottom: 2" in result.output
    assert "demo" in _graft("config").output


def test_runs_and_plot_show_what_was_run() -> None:
    assert "no run has ended" in _graft("runs").output
    recorder = Recorder(Config(), say=lambda line: None)
    turnout = Turnout(asked=("a", "b"), clients=("a", "b"))
    recorder(
        RoundDone(round=0, train=None, evaluate={"loss": 5.5}, training=None, evaluation=turnout)
    )
    recorder.finish()
    listed = _graft("runs").output
    assert recorder.folder.name in listed
    assert "5.500 -> 5.500" in listed
    (recorder.folder / "loss.png").unlink()
    drawn = _graft("plot", recorder.folder.name)
    assert drawn.exit_code == 0
    assert Path(drawn.output.strip()) == recorder.folder / "loss.png"
    assert (recorder.folder / "loss.png").exists()
    assert json.loads((recorder.folder / "summary.json").read_text())["status"] == "finished"


def test_runs_lists_a_run_whose_summary_is_damaged_or_lacks_figures() -> None:
    texts = {"damaged": "[1", "other": "{}", "short": '{"status": "finished"}'}
    folders = {}
    for name, text in texts.items():
        recorder = Recorder(Config(), say=lambda line: None)
        recorder.finish()
        (recorder.folder / "summary.json").write_text(text)
        folders[name] = recorder.folder.name

    result = _graft("runs")

    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1] for line in result.output.splitlines()}
    assert {name: rows[folder] for name, folder in folders.items()} == {
        "damaged": "unfinished",
        "other": "unfinished",
        "short": "finished",
    }


def test_runs_lists_what_goes_on_as_running_and_what_was_killed_as_unfinished() -> None:
    recorder = Recorder(Config(), say=lambda line: None)
    killed = Recorder(Config(), say=lambda line: None)
    killed._alone.release()  # as the system does with a process that is gone
    ended = Recorder(Config(), say=lambda line: None)
    ended.finish()
    rows = {line.split()[0]: line.split()[1] for line in _graft("runs").output.splitlines()}
    assert rows[recorder.folder.name] == "running"
    assert rows[killed.folder.name] == "unfinished"
    assert rows[ended.folder.name] == "finished"
