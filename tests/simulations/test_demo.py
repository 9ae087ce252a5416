"""The demo judges a run by what it left, and forgives Ray a late start once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.rules import ConfigError
from simulations import demo as tool
from simulations.local_flower import COMPLETED, Outcome


class _Flower:
    """Answers `run` with prepared outcomes."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes, self.runs = outcomes, 0

    def run(self, *arguments: Any, **options: Any) -> Outcome:
        self.runs += 1
        return self.outcomes[self.runs - 1]


def _outcome(folder: Path | None = None, line: str = "", **summary: Any) -> Outcome:
    if folder is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return Outcome(
        run_id="1",
        status=COMPLETED if folder else "finished:failed",
        details="N/A" if folder else "Simulation failed",
        folder=folder,
        lines=[line],
    )


def _bring(monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome) -> _Flower:
    flower = _Flower(list(outcomes))

    @contextlib.contextmanager
    def superlink() -> Iterator[_Flower]:
        yield flower

    monkeypatch.setattr(tool, "local_superlink", superlink)
    return flower


GOOD = {
    "eval_loss_first": 5.5,
    "eval_loss_last": 2.5,
    "eval_perplexity_last": 12.2,
    "rounds": 3,
    "clients": 2,
}


def test_demo_says_where_the_results_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _bring(monkeypatch, _outcome(tmp_path, **GOOD))
    lines: list[str] = []
    assert tool.demo(lines.append) == tmp_path
    assert any(str(tmp_path) in line for line in lines)
    assert any("5.500 -> 2.500" in line for line in lines)


@pytest.mark.parametrize(("last", "words"), [(4.0, "a fall of 2 nats"), (None, "no held-out loss")])
def test_demo_that_learned_too_little_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: float | None, words: str
) -> None:
    _bring(monkeypatch, _outcome(tmp_path, **{**GOOD, "eval_loss_last": last}))
    with pytest.raises(RuntimeError, match=words):
        tool.demo(lambda line: None)


def test_failed_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = _bring(monkeypatch, _outcome(line="ValueError: boom"), _outcome())
    with pytest.raises(RuntimeError, match="did not complete: Simulation failed"):
        tool.run_experiment("demo", say=lambda line: None)
    assert flower.runs == 1


def test_late_ray_gets_one_more_chance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    late = _outcome(line=f"Exception: {tool.RAY_LATE}. This could happen because")
    flower = _bring(monkeypatch, late, _outcome(tmp_path, **GOOD))
    assert tool.run_experiment("demo", say=lambda line: None).folder == tmp_path
    assert flower.runs == 2
    _bring(monkeypatch, late, late)
    with pytest.raises(RuntimeError, match="did not complete"):
        tool.run_experiment("demo", say=lambda line: None)


def test_wrong_configuration_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    flower = _bring(monkeypatch)
    with pytest.raises(ConfigError, match="did you mean"):
        tool.run_experiment("demo", "train.lrr=1", say=lambda line: None)
    assert flower.runs == 0
