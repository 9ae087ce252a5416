"""The study compares like with like, and two of its methods coincide with plain PyTorch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flower_app.data.client import ClientData, Example
from simulations.study import study as tool
from simulations.study.methods import METHODS, SAME
from simulations.study.plot import DIVISIONS, table
from simulations.study.settings import Study, divergence
from simulations.study.study import Curve, Job

TINY = Study(
    clients=3,
    rounds=2,
    local_steps=3,
    batch_size=2,
    context=32,
    hidden=16,
    blocks=3,
    seeds=(0,),
    rates=(4e-3,),
    heldout=0.1,
    max_examples=20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(folder: Path, said: list[str]) -> dict[str, Any]:
    return tool.run_study(TINY, folder, say=said.append, workers=1)


def curves_of(result: dict[str, Any], division: str) -> dict[str, dict[str, Any]]:
    return {c["method"]: c for c in result["curves"] if c["division"] == division}


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("method", SAME)
def test_a_split_method_coincides_with_plain_pytorch(
    result: dict[str, Any], method: str, division: str
) -> None:
    curves = curves_of(result, division)
    own, reference = curves[method], curves[SAME[method]]

    assert own["losses"] == pytest.approx(reference["losses"], abs=2e-5)
    assert (own["tokens"], own["steps"]) == (reference["tokens"], reference["steps"])
    assert own["losses"][0] - own["losses"][-1] > 0.01


@pytest.mark.parametrize("division", DIVISIONS)
def test_all_methods_see_the_same_tokens_and_differ_where_they_should(
    result: dict[str, Any], division: str
) -> None:
    curves = curves_of(result, division)

    assert curves.keys() == METHODS.keys()
    assert len({tuple(c["tokens"]) for c in curves.values()}) == 1
    assert len({c["heldout_tokens"] for c in curves.values()}) == 1
    assert len({c["losses"][0] for c in curves.values()}) == 1
    assert len({round(c["losses"][-1], 4) for c in curves.values()}) == 4
    assert {m for m, c in curves.items() if c["steps"][-1] != 6} == {"splitfed-v2"}
    assert curves["splitfed-v2"]["steps"] == [0, 9, 18]


def test_a_curve_repeats(result: dict[str, Any]) -> None:
    again = tool.run_job(TINY, Job("splitfed-v2", "iid", 0, 4e-3))

    assert again.losses == curves_of(result, "iid")["splitfed-v2"]["losses"]


def test_the_study_leaves_curves_table_and_plot(
    result: dict[str, Any], folder: Path, said: list[str]
) -> None:
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(result))
    assert all(gap < 2e-5 for gap in result["differences"].values())
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "study.md").read_text()
    assert text == table(result)
    assert all(f"| {name} |" in text for name in METHODS.values())
    assert said[-1] == text
    assert "| by topic |" in text


def test_divergence_is_none_of_equals_and_the_most_of_strangers() -> None:
    def having(*ids: int) -> ClientData:
        tensor = torch.tensor(ids)
        return ClientData("", [Example(tensor, tensor)], [], 1, 0)

    assert divergence([having(1, 2, 3), having(1, 2, 3)]) == pytest.approx(0.0)
    assert divergence([having(1, 2, 3), having(4, 5, 6)]) == pytest.approx(math.log(2))


def test_rates_are_searched_with_the_first_seed_and_shared_by_what_must_coincide() -> None:
    study = replace(TINY, seeds=(5, 6), rates=(1e-3, 2e-3))
    curves = [
        Curve(method, division, seed, lr, losses=[5.0, loss])
        for division in DIVISIONS
        for method in METHODS
        for seed, lr, loss in (
            (5, 1e-3, 2.0),
            (5, 2e-3, float("nan") if method == "fedavg" else 1.0),
            (6, 1e-3, 0.5),
        )
    ]

    rates = tool.chosen_rates(study, curves)

    for division in DIVISIONS:
        assert rates[division] == {
            **dict.fromkeys(METHODS, 2e-3),
            "fedavg": 1e-3,
            "splitfed-v1": 1e-3,
        }


def test_differences_are_of_the_same_division_seed_and_rate() -> None:
    def of(method: str, seed: int, losses: list[float]) -> Curve:
        return Curve(method, "iid", seed, 1e-3, losses=losses)

    curves = [
        *(of("fedavg", 0, [5.0, 3.0]), of("splitfed-v1", 0, [5.0, 3.5])),
        *(of("fedavg", 1, [9.0, 2.0]), of("splitfed-v1", 1, [9.25, 2.0])),
        *(of("centralised", 0, [4.0]), of("merged-step", 0, [4.0])),
    ]

    assert tool.differences(curves) == {
        "splitfed-v1": 0.5,
        "merged-step": 0.0,
    }
