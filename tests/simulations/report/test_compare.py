"""Settings are compared seed by seed, and what cannot be tested is said in words."""

from __future__ import annotations

import re
from typing import Any

import pytest
from scipy import stats

from simulations.report.compare import compare, paired_test


def run(lr: float, seed: int, loss: float | None, status: str = "finished") -> dict[str, Any]:
    axes = ("steps", "rounds", "seconds", "tokens", "mb")
    losses = [5.0, loss] if loss is not None else [5.0]
    curve = {**{name: [0.0, 1.0][: len(losses)] for name in axes}, "loss": losses}
    return {
        "name": f"{lr}-{seed}",
        "seed": seed,
        "status": status,
        "config": {"seed": seed, "train.lr": lr, "output.folder": f"/{lr}/{seed}"},
        "summary": {"clients": 2, "heldout_last": loss},
        "curves": {"heldout": curve},
    }


def test_seeds_of_a_setting_are_joined_and_settings_tested_in_pairs() -> None:
    low, high = [3.0, 3.2, 2.9, 3.4, 3.1], [3.3, 3.4, 3.3, 3.8, 3.2]
    runs = [run(lr, s, v) for lr, vs in ((0.1, low), (0.2, high)) for s, v in enumerate(vs)]

    told = compare(runs[9:4:-1] + runs[:5])  # the order of runs pairs nothing

    assert told["differing"] == ["seed", "train.lr", "output.folder"]
    second, first = told["settings"]
    assert (first["setting"], first["seeds"]) == ("train.lr=0.1", [0, 1, 2, 3, 4])
    assert (first["mean"], first["spread"]) == pytest.approx((3.12, 0.19235384))
    assert first["band"]["loss"] == [5, 3.12]
    assert first["band"]["high"][1] == pytest.approx(3.12 + 0.192354, abs=1e-4)
    (test,) = told["tests"]
    wanted = stats.ttest_rel(low, high)
    assert (test["one"], test["n"]) == (second["setting"], 5)
    assert test["difference"] == pytest.approx(-0.28)
    assert test["p"] == pytest.approx(wanted.pvalue)
    assert test["low"] < test["difference"] < test["high"] < 0
    assert test["words"] == "train.lr=0.1 ends lower"
    assert "not corrected for 1 comparison." in told["words"]


def final(*losses: float) -> dict[str, Any]:
    return {"setting": "s", "final": dict(enumerate(losses))}


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (final(3.0), {"setting": "t", "final": {7: 2.0}}, "no seed in common"),
        (final(3.0, 3.1), {"setting": "t", "final": {1: 2.0}}, "one seed in common"),
        (final(3.0, 3.5), final(2.5, 3.0), "the same for every seed"),
        (final(3.0, 3.1), final(3.1, 3.0), "no difference .* 2 pairs are few, add seeds"),
    ],
)
def test_too_few_seeds_are_said_to_be_so(one: Any, other: Any, words: str) -> None:
    told = paired_test(one, other)
    assert (told["p"] is None) == ("few" not in words)
    assert re.search(words, told["words"])


def test_runs_that_did_not_finish_give_no_final_loss() -> None:
    told = compare([run(0.1, 0, 3.0), run(0.1, 1, 9.0, "failed"), run(0.2, 0, None)])
    assert told["settings"][0]["final"] == {0: 3.0}
    assert told["tests"] == []
    assert "nothing is tested" in told["words"]


def test_single_runs_are_said_to_show_nothing_beyond_chance() -> None:
    assert (
        "whether they differ beyond chance"
        in compare([run(0.1, 0, 3.0), run(0.2, 0, 2.0)])["words"]
    )
    assert "one setting" in compare([run(0.1, 0, 3.0), run(0.1, 1, 2.0)])["words"]
