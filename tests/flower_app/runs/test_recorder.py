"""A run folder says what happened: every step, every round, and how it ended."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config, OutputConfig
from flower_app.runs.folders import find_last_run, new_folder, read_summaries, runs_folder
from flower_app.runs.history import read_history
from flower_app.runs.journal import read_records
from flower_app.runs.plots import _smoothing, plot_loss
from flower_app.runs.recorder import Recorder
from strategies.events import RoundDone, StepDone, Turnout

SUMMARY_KEYS = {
    "rounds",
    "clients",
    "strategy",
    "eval_loss_first",
    "eval_loss_last",
    "eval_perplexity_last",
    "tokens",
    "bytes_up",
    "bytes_down",
    "seconds",
    "tokens_per_second",
    "status",
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(Config(), output=OutputConfig(folder=str(tmp_path), log_every=2))


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """What follows the first line, which tells of the start."""
    first, *others = read_records(folder / "metrics.jsonl")
    assert first["kind"] == "start"
    return iter(others)


def _step(recorder: Recorder, **changes: Any) -> None:
    values: dict[str, Any] = {
        "round": 1,
        "attempt": 1,
        "client": "a",
        "step": 1,
        "steps": 4,
        "loss": 5.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 100,
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": {"bottom": 0.1, "network": 0.1, "trunk": 0.2, "top": 0.1},
    }
    recorder(StepDone(**{**values, **changes}))


def _round(recorder: Recorder, **changes: Any) -> None:
    values: dict[str, Any] = {
        "round": 1,
        "train": {"loss": 4.0},
        "evaluate": {"loss": 3.0, "tokens": 50},
        "asked": ["b", "a"],
        "clients": ["b", "a"],
        "missing": {},
        "tokens": 200,
        "bytes_up": 1_000_000,
        "bytes_down": 2_000_000,
        "seconds": 2.0,
    }
    values |= changes
    abandoned = [_turnout(**turnout) for turnout in values.pop("abandoned", [])]
    evaluation = values.pop("evaluation", None)
    recorder(
        RoundDone(
            training=_turnout(**{key: values.pop(key) for key in ("asked", "clients", "missing")}),
            evaluation=_turnout(**evaluation) if evaluation else None,
            abandoned=tuple(abandoned),
            **values,
        )
    )


def _turnout(asked: Sequence[str], clients: Sequence[str], missing: dict[str, str]) -> Turnout:
    return Turnout(asked=tuple(asked), clients=tuple(clients), missing=missing)


def test_finished_run_leaves_everything(config: Config, tmp_path: Path) -> None:
    # Prepare
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    model = recorder.folder / "model"
    model.mkdir()

    # Execute
    recorder.start()
    _round(recorder, round=0, train=None, evaluate={"loss": 5.5}, tokens=0)
    for step in range(1, 5):
        _step(recorder, step=step)
    _round(recorder, missing={"c": "no answer within 60 s"})
    summary = recorder.finish(model)

    # Assert
    assert {path.name for path in recorder.folder.iterdir()} == {
        "config.yaml",
        "loss.png",
        "metrics.jsonl",
        "model",
        "summary.json",
    }
    assert json.loads((recorder.folder / "summary.json").read_text()) == summary
    assert set(summary) >= SUMMARY_KEYS
    assert summary["missing"] == {"c": "no answer within 60 s"}
    assert (summary["rounds"], summary["clients"], summary["tokens"]) == (1, 2, 200)
    assert (summary["eval_loss_first"], summary["eval_loss_last"]) == (5.5, 3.0)
    assert summary["eval_perplexity_last"] == pytest.approx(math.exp(3.0))
    assert (summary["bytes_up"], summary["bytes_down"]) == (2_000_000, 4_000_000)
    assert str(recorder.folder) in lines[0]
    assert str(recorder.folder) in lines[-1]
    assert recorder.folder.is_absolute()
    kinds = [record["kind"] for record in read_metrics(recorder.folder)]
    assert kinds == ["round", "step", "step", "step", "step", "round"]


def test_console_lines_say_what_matters(config: Config) -> None:
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    for step in range(1, 5):
        _step(recorder, step=step)
    _round(recorder, missing={"c": "no answer within 60 s"})
    assert len(lines) == 3, "two steps are silent with log_every=2"
    assert "step    2/4" in lines[0]
    assert "loss 5.0000" in lines[0]
    assert "200 tokens/s" in lines[0]
    for part in (
        "train loss 4.0000 (perplexity 54.6)",
        "held-out loss 3.0000",
        "100 tokens/s",
        "1.0 MB up, 2.0 MB down",
        "clients: a, b",
        "missing: c (no answer within 60 s)",
    ):
        assert part in lines[2]


def test_a_round_of_a_hundred_has_a_line_that_can_be_read(config: Config) -> None:
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    names = [f"site-{number:03}" for number in range(110)]
    missing = dict.fromkeys(names[100:], "not needed: 100 of 110 answered first")
    missing[names[100]] = "its stream broke"

    _round(recorder, asked=names, clients=names[:100], missing=missing)
    _round(recorder, asked=names[:100], clients=names[:100], missing={})

    first = ", ".join(names[:8])
    assert f"clients 100 of 110: {first} and 92 more | missing: site-100 (its stream" in lines[0]
    assert ", site-101, site-102, site-103, site-104, site-105, site-106, site-107 (not" in lines[0]
    assert lines[0].endswith("(not needed: 100 of 110 answered first) and 2 more")
    assert lines[1].endswith(f"clients 100 of 100: {first} and 92 more")
    assert all(len(line) < 500 for line in lines)
    record = next(read_metrics(recorder.folder))
    assert (record["asked"], record["missing"]) == (names, missing), "the file has all of them"


def test_who_was_dropped_is_counted_over_all_rounds_and_attempts(config: Config) -> None:
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    undone = {"asked": ["a", "c"], "clients": ["a"], "missing": {"c": "gone"}}
    late = {"asked": ["a", "d"], "clients": ["a"], "missing": {"d": "late"}}

    _round(recorder, asked=["a", "b", "c"], missing={"c": "killed"})
    _round(recorder, round=2, abandoned=[undone], evaluation=late)

    summary = recorder.finish()
    assert summary["dropped"] == {"c": 2, "d": 1}
    assert summary["missing"] == {"d": "late"}
    assert "missing: c (killed)" in lines[0]
    assert "attempt 1 had no quorum, missing: c (gone) | missing in the ev" in lines[1]
    second = list(read_metrics(recorder.folder))[1]
    assert (second["attempts"], second["abandoned"], second["evaluation"]) == (2, [undone], late)


def test_a_step_says_to_which_attempt_it_belongs_if_not_to_the_first(config: Config) -> None:
    recorder = Recorder(config, say=lambda line: None)
    _step(recorder)
    _step(recorder, attempt=2)
    assert [step.get("attempt") for step in read_metrics(recorder.folder)] == [None, 2]


def test_run_without_evaluation_says_that_it_finished(config: Config) -> None:
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    _round(recorder, evaluate=None, missing={"c": "late"})
    _round(recorder, round=2, evaluate=None)
    assert "missing" not in recorder.finish(), "everybody was there in the last round"
    assert lines[-2].startswith("finished: not evaluated, 400 tokens, 2.0 MB up, 4.0 MB down")


def test_run_that_failed_at_once_leaves_no_empty_plot(config: Config) -> None:
    recorder = Recorder(config, say=lambda line: None)
    recorder.fail("no such model")
    assert not (recorder.folder / "loss.png").exists()


def test_folder_that_cannot_be_written_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output.folder .*file/runs cannot be written: Not a dir"):
        new_folder(tmp_path / "file" / "runs", "demo")


def test_legend_says_what_the_faint_lines_are() -> None:
    assert _smoothing({"a": [1.0] * 79}) is None
    words = "smoothed over {} steps; raw values faint"
    assert _smoothing({"a": [1.0] * 120, "b": [1.0]}) == words.format(3)
    assert _smoothing({"a": [1.0] * 120, "b": [1.0] * 80}) == words.format("2-3")


def test_two_runs_in_one_second_get_two_folders(config: Config) -> None:
    folders = {Recorder(config).folder for _ in range(5)}
    assert len(folders) == 5


def test_steps_from_many_threads_are_whole_lines(config: Config) -> None:
    recorder = Recorder(config, say=lambda line: None)

    def send(client: str) -> None:
        for step in range(1, 201):
            _step(recorder, client=client, step=step, steps=200)

    threads = [threading.Thread(target=send, args=(f"client-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = list(read_metrics(recorder.folder))
    assert len(records) == 1600
    for index in range(8):
        mine = [record["step"] for record in records if record["client"] == f"client-{index}"]
        assert mine == list(range(1, 201))


def test_failed_run_says_why_and_is_not_a_last_run(config: Config, tmp_path: Path) -> None:
    recorder = Recorder(config, say=lambda line: None)
    _step(recorder, loss=float("nan"))
    recorder.fail(RuntimeError("trunk is gone"))
    summary = json.loads((recorder.folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"] == "RuntimeError: trunk is gone"
    assert summary["eval_loss_last"] is None
    assert next(read_metrics(recorder.folder))["loss"] is None, "NaN is not JSON"
    with pytest.raises(ValueError, match="no finished run of experiment 'demo'.*make demo"):
        find_last_run("demo", tmp_path)


def test_last_run_is_the_newest_finished_one(config: Config, tmp_path: Path) -> None:
    models = []
    for _ in range(3):
        recorder = Recorder(config, say=lambda line: None)
        model = recorder.folder / "model"
        model.mkdir()
        recorder.finish(model)
        models.append(model)
    Recorder(config, say=lambda line: None).fail("late failure")
    Recorder(replace(config, experiment="lora"), say=lambda line: None).finish()
    assert find_last_run("demo", tmp_path) == models[-1]
    assert len(read_summaries(tmp_path)) == 5
    with pytest.raises(ValueError, match="graft run lora"):
        find_last_run("lora", tmp_path)


def test_killed_run_can_still_be_read_and_drawn(config: Config) -> None:
    recorder = Recorder(config, say=lambda line: None)
    _step(recorder)
    with (recorder.folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "st')
    assert len(list(read_metrics(recorder.folder))) == 1
    assert plot_loss(read_history(recorder.folder)).stat().st_size > 10_000


def test_runs_folder_honours_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    assert runs_folder() == tmp_path / "runs"
    monkeypatch.delenv("GRAFT_HOME")
    assert runs_folder() == Path.home() / ".graft" / "runs"
    with pytest.raises(ValueError, match="output.folder is the relative path 'here'"):
        runs_folder("here")
