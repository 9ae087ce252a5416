"""The front: the strongest attack of each knowledge, against the undefended run's loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conf.load import load_config
from flower_app.check import check_names
from simulations.audit.observation import EXACT, PUBLIC, START
from simulations.study.privacy import study
from simulations.study.privacy.report import markdown, plot, summary
from simulations.study.privacy.settings import NOTHING, POINTS, condition_of


def line(point: str, seed: int, loss: float, *rows: tuple[str, str, float]) -> dict[str, Any]:
    """What `runs.jsonl` holds of a run."""
    told = [{"metric": m, "knowledge": k, "mean": value} for m, k, value in rows]
    own = {"model": "demo", "point": point, "family": point, "strength": "", "seed": seed}
    return {**own, "loss": loss, "attacks": ["a"], "rows": told, "refused": {}, "seconds": 1.0}


RUNS = [
    line("nothing", 0, 2.0, ("tokens", EXACT, 0.3)),  # another attack of the same run
    line("nothing", 0, 2.0, ("tokens", EXACT, 1.0), ("tokens", START, 0.9), ("names", EXACT, 0.2)),
    line("nothing", 1, 4.0, ("tokens", EXACT, 0.8)),
    line("noise", 0, 2.2, ("tokens", EXACT, 0.1), ("tokens", EXACT, 0.3), ("labels", EXACT, 0.5)),
    line("noise", 1, 4.0, ("tokens", EXACT, 0.1), ("tokens", PUBLIC, 0.05)),
    line("noise", 7, 9.0, ("tokens", EXACT, 1.0)),
]


def test_the_strongest_attack_counts_and_only_seeds_with_a_base() -> None:
    found = summary(RUNS)["demo"]
    assert found["nothing"]["gap"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    noise = found["noise"]
    assert noise["seeds"] == [0, 1]
    assert noise["gap"] == pytest.approx({"mean": 0.05, "low": 0.0, "high": 0.1})
    assert noise["tokens"][EXACT] == pytest.approx({"mean": 0.2, "low": 0.1, "high": 0.3})
    assert noise["tokens"][START]["mean"] == 0.05, "who knows more has what who knows less has"
    assert found["nothing"]["tokens"][PUBLIC] is None
    assert noise["labels"][EXACT]["mean"] == 0.5
    row = "| noise | +5.0 % (+0.0 to +10.0) | 20.0 % (10.0 to 30.0) |" + 3 * " 5.0 % |"
    assert f"{row} 50.0 % | - | 2 |" in markdown(summary(RUNS))


def test_every_point_is_a_configuration_that_can_run() -> None:
    """And no two have the same name."""
    for point in POINTS:
        check_names(condition_of(point, "demo").config(0))
    assert len({point.name for point in POINTS}) == len(POINTS)
    assert POINTS[0] == NOTHING
    assert condition_of(NOTHING, "demo").config(0).privacy == load_config("demo").privacy


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not run again, and the picture is drawn."""
    trained: list[tuple[str, int]] = []

    class Told:
        loss_with, heldout_tokens, seconds = 2.0, 10, 0.5

    def train(condition: Any, mix: Any, seed: int) -> Told:
        trained.append((condition.overrides, seed))
        return Told()

    rows = [{"metric": "tokens", "knowledge": EXACT, "mean": 0.5}]
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(
        study, "audit", lambda *a, **k: {"rows": rows, "refused": {}, "seconds": 0.1}
    )
    for seeds in ([0], [0, 1]):
        study.study_privacy("demo", POINTS[:5], seeds, tmp_path, say=lambda line: None)
    assert len(trained) == len(set(trained)) + 2 * 3 == 10  # codecs have no overrides
    study.study_privacy("demo", [], [0], tmp_path, attacks=["a new one"], say=lambda line: None)
    assert len(trained) == 11
    assert (tmp_path / "privacy.png").stat().st_size > 5000
    plot({}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
