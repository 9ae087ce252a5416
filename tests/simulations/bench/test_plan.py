"""Plans against real steps between two processes: memory, bytes and seconds."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from simulations.bench import plan
from simulations.bench.plan import BOUNDS, CASES, bench_plan
from simulations.cli.app import app


@pytest.mark.slow
def test_plans_come_true() -> None:
    result = bench_plan()
    assert len({family for family, *_ in CASES.values()}) >= 5
    assert list(result["cases"]) == list(CASES)
    assert result["within"], result["worst"]
    assert BOUNDS == {"memory": 0.1, "bytes": 0.1, "step": 0.2}


def test_a_case_that_is_not_there_is_named_with_those_that_are() -> None:
    done = CliRunner().invoke(app, ["bench", "plan", "--cases", "gpt3"])
    assert done.exit_code == 2
    assert "gpt3" in done.output
    assert "gpt2" in done.output


@pytest.mark.parametrize(("step", "status"), [(1.1, 0), (1.3, 1)])
def test_what_is_further_off_than_it_may_is_a_failure(
    step: float, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {
        key: {"plan": ratio, "real": 1.0, "ratio": ratio}
        for key, ratio in dict.fromkeys(plan.KEYS, 1.0).items()
    }
    case["step_s"] = {"plan": step, "real": 1.0, "ratio": step}
    monkeypatch.setattr(plan, "_case", lambda *_: case)
    monkeypatch.setattr(plan, "_resident", lambda name: {"ratio": 1.0})
    monkeypatch.setattr(plan, "_trunk_process", lambda: nullcontext(SimpleNamespace(pid=0)))
    monkeypatch.setattr(plan, "_between", lambda *_: nullcontext(None))

    done = CliRunner().invoke(app, ["bench", "plan", "--cases", "llama"])

    assert done.exit_code == status, done.output
    assert f"{step:.2f}" in done.output
