"""What is read of a run counts each step once, whatever it went through and whoever wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config, OutputConfig
from flower_app.runs.folders import RunLock
from flower_app.runs.history import Follower, read_history
from flower_app.runs.journal import cut_back
from flower_app.runs.recorder import Recorder
from strategies.events import Asked

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


def line(kind: str, number: int, at: float | None = None, **more: Any) -> str:
    """A record, written `at` seconds after noon."""
    told = {"kind": kind, "round": number, **more}
    if at is not None:
        told["time"] = (START + timedelta(seconds=at)).isoformat()
    return json.dumps(told) + "\n"


def step(number: int, at: float | None, client: str = "a", **more: Any) -> str:
    taken = {"bottom": 0.5, "network": 0.5, "trunk": 1.0, "top": 0.0}
    return line("step", number, at, client=client, loss=1.0, seconds=taken, **more)


def journal(folder: Path, *lines: str) -> Path:
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def test_steps_of_undone_attempts_do_not_count(tmp_path: Path) -> None:
    journal(
        tmp_path,
        step(1, 1),
        step(2, 2),
        step(2, 3, "b"),
        step(2, 4, attempt=2),
        step(2, 5, "late"),
        line("asked", 2, 6, attempt=3, training=True, clients=["a"]),
        step(2, 7, "c", attempt=3),
        line("asked", 2, 8, attempt=3, training=False, clients=["a"]),
        step(3, 9),
    )

    history = read_history(tmp_path)

    counted = [(each["round"], each["client"], each["at"]) for each in history.steps]
    assert counted == [(1, "a", 0.0), (2, "c", 6.0), (3, "a", 8.0)]
    assert len(history.asked) == 2


def test_the_time_between_a_stop_and_the_resume_is_no_running_time(tmp_path: Path) -> None:
    journal(
        tmp_path,
        line("start", 0, 0, environment={"graft": "1"}),
        step(1, 10),
        line("round", 1, 20, seconds=15),
        line("resume", 1, 5000, environment={"graft": "2"}),
        step(2, 5010),
        line("resume", 1, 9000),
        step(2, 9001),
    )

    history = read_history(tmp_path)

    assert [each["at"] for each in history.steps] == [10, 30, 31]
    assert (history.seconds, history.rounds[0]["at"]) == (31, 20)
    assert (history.started, history.last) == (START, START + timedelta(seconds=9001))
    assert (history.environment, history.estimated) == ({"graft": "2"}, False)


def test_an_earlier_grafts_record_has_times_made_of_durations(tmp_path: Path) -> None:
    journal(
        tmp_path,
        line("round", 0, seconds=3, evaluate={"loss": 5.0}),
        step(1, None),
        step(1, None, "b"),
        step(1, None),
        line("trained", 1, seconds=6),
        line("round", 1, seconds=8),
        step(2, None),
        line("resume", 1, 500),
        step(2, 502),
    )

    history = read_history(tmp_path)

    assert [each["at"] for each in history.steps] == [5, 5, 7, 13, 15]
    assert [each["at"] for each in history.rounds] == [3, 11]
    assert (history.estimated, history.environment, history.model) == (True, {}, "")


def test_following_reads_what_is_new_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    follower, path = Follower(tmp_path), tmp_path / "metrics.jsonl"
    assert follower.poll().status == "unfinished"
    whole = step(1, 2)
    for text, steps in ((step(1, 1), 1), (whole[:20], 1), (whole[20:-1], 2), ("\n" + whole, 3)):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        assert len(follower.poll().steps) == steps
    assert not follower.poll().damaged

    path.open("a").write(line("round", 1, 3) + step(2, 4) + "garbage\n" + step(2, 4))
    assert (len(follower.poll().steps), follower.poll().damaged) == (5, [6])

    path.open("a").write("x")  # a resume replaces the file, by one that may be as long
    cut_back(path, 0)
    assert (follower.poll().steps, follower.poll().rounds) == ([], [])


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_a_run_tells_how_it_is(end: str, tmp_path: Path) -> None:
    config = replace(Config(), output=OutputConfig(folder=str(tmp_path)))
    recorder = Recorder(config, say=lambda text: None)
    recorder.built("a model", {})
    recorder(Asked(round=1, attempt=1, training=True, clients=("a",)))

    history = read_history(recorder.folder)
    assert (history.status, history.model, history.planned) == ("running", "a model", 3)
    assert history.environment["cpus"] > 0
    assert history.asked[0]["clients"] == ["a"]
    if end == "fail":
        recorder.fail("no more")
        assert read_history(recorder.folder).status == "failed"
    else:
        recorder.finish()
        assert read_history(recorder.folder).status == "finished"
    (recorder.folder / "summary.json").unlink()
    assert read_history(recorder.folder).status == "unfinished"
    RunLock(recorder.folder).release()  # the look has not kept it


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder: it has no metrics.jsonl"):
        read_history(tmp_path)
