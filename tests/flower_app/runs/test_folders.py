"""The newest run is the one that was recorded last, whatever its folder is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flower_app.runs.folders import began, find_last_run, in_order, new_folder, read_summaries
from flower_app.runs.instants import BEFORE_ALL, instant, now


def finished(parent: Path, name: str, instants: tuple[str, str], **changes: Any) -> Path:
    """A run folder with a model, as a finished run leaves it."""
    run = parent / name
    (run / "model").mkdir(parents=True)
    started, ended = instants
    summary = {"status": "finished", "experiment": "demo", "model": "model", **changes}
    summary |= {"started": started, "finished": ended}
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run


SUMMER, WINTER = "2026-10-25T02:50:00+02:00", "2026-10-25T02:10:00+01:00"
"""Twenty minutes apart, while clocks go back: text sorts them the other way round."""


def test_instants_are_compared_as_instants() -> None:
    assert instant(SUMMER) < instant(WINTER)
    assert instant("2026-10-25T00:50:00Z") == instant(SUMMER)
    assert instant("2026-10-25T00:50:00") == instant(SUMMER), "no offset is UTC"
    assert instant(SUMMER).isoformat() == "2026-10-25T00:50:00+00:00"
    assert [instant(odd) for odd in ("then", "", None, 3)] == [BEFORE_ALL] * 4
    assert now().endswith("+00:00")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SUMMER, WINTER),
        ("2026-11-25T23:30:00+09:00", "2026-11-25T15:30:00+00:00"),
        ("2026-11-25T15:30:00Z", "2026-11-25T15:30:00.000001+00:00"),
        (None, "2026-11-25T15:30:00Z"),
    ],
)
def test_the_newest_run_is_the_one_that_ended_last(first: str, second: str, tmp_path: Path) -> None:
    older = finished(tmp_path, "20261125-120000-demo-2", (first, first))
    newer = finished(tmp_path, "20261125-120000-demo", (second, second))

    assert find_last_run("demo", tmp_path) == newer / "model"
    assert [run for run, _ in read_summaries(tmp_path)] == [older, newer]
    assert in_order([newer, older]) == [older, newer]


def test_a_run_without_summary_began_when_its_checkpoint_or_its_name_says(tmp_path: Path) -> None:
    kept = tmp_path / "20991231-235959-demo"
    state = kept / "checkpoints" / "round-0003" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"started": SUMMER}), encoding="utf-8")
    fresh = new_folder(tmp_path, "demo")
    odd = tmp_path / "by-hand"
    odd.mkdir()

    assert began(kept) == instant(SUMMER)
    assert abs(began(fresh) - instant(now())).total_seconds() < 10
    assert in_order([fresh, kept, odd]) == [odd, kept, fresh]


@pytest.mark.parametrize("absolute", [False, True])
def test_a_model_moves_with_its_run(absolute: bool, tmp_path: Path) -> None:
    """Earlier Grafts wrote where the model was; that place may hold another run's by now."""
    told = str(tmp_path / "old" / "one" / "model") if absolute else "model"
    run = finished(tmp_path / "old", "one", (WINTER, WINTER), model=told)

    shutil.copytree(run.parent, tmp_path / "copy")
    assert find_last_run("demo", tmp_path / "copy") == tmp_path / "copy" / "one" / "model"
    shutil.move(run.parent, tmp_path / "new")
    assert find_last_run("demo", tmp_path / "new") == tmp_path / "new" / "one" / "model"


def test_a_summary_that_cannot_be_read_is_no_run(tmp_path: Path) -> None:
    for number, text in enumerate(("", "[]", "{", "\0\0")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "summary.json").write_text(text)
    assert read_summaries(tmp_path) == []
