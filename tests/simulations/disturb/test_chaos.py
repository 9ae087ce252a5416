"""Disturbed runs: what is drawn, what is met, what is judged (section E of reliability)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simulations.disturb import chaos, chaos_run
from simulations.disturb.chaos_run import POLICIES, Plan, Result, draw_plan, run_plan, undisturbed
from simulations.disturb.faults import DOWN, KINDS, UP, Faults, draw_schedule


@pytest.fixture(autouse=True)
def _alone(one_thread: None) -> None:
    """Results are compared bit for bit."""


def passed(faults: Faults, frames: list[bytes], way: str = UP) -> list[bytes]:
    return list(faults._pass(iter(frames), way, lambda: None))


@pytest.mark.parametrize(
    ("kind", "arrive"),
    [
        ("lose", ["a", "cccc"]),
        ("duplicate", ["a", "bbbb", "bbbb", "cccc"]),
        ("reorder", ["a", "cccc", "bbbb"]),
        ("truncate", ["a", "bb", "cccc"]),
        ("corrupt", ["a", "bbrb", "cccc"]),
        ("delay", ["a", "bbbb", "cccc"]),
        ("break", ["a", "cccc"]),
    ],
)
def test_every_kind_does_what_it_says(kind: str, arrive: list[str]) -> None:
    faults = Faults({(UP, 1): kind}, delay=0.0)
    assert passed(faults, [b"a", b"bbbb", b"cccc"]) == [text.encode() for text in arrive]
    assert faults.met == {kind: 1}
    assert passed(faults, [b"a", b"b"], DOWN) == [b"a", b"b"]


def test_schedules_repeat_and_hold_all_kinds() -> None:
    one, same, other = (draw_schedule(seed, 200, 0.2) for seed in (1, 1, 2))
    assert one == same != other
    assert set(one.values()) == set(KINDS)
    assert 0.1 < len(one) / 400 < 0.3
    assert draw_plan(3, "merged") == draw_plan(3, "merged")
    plans = [draw_plan(seed, "splitfed-v1") for seed in range(200)]
    assert 40 < sum(plan.dying is not None for plan in plans) < 100
    assert 40 < sum(plan.trunk_dies is not None for plan in plans) < 100
    assert all(plan.rate or plan.deaths() for plan in plans), "somebody is not disturbed at all"


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(name, marks=[] if name == "merged-step" else pytest.mark.slow)
        for name in POLICIES
    ],
)
def test_a_run_with_faults_and_deaths_ends_as_if_nothing_had_happened(
    policy: str, tmp_path: Path
) -> None:
    plan = Plan(seed=7, policy=policy, rate=0.05, dying=(1, 1, 6), trunk_dies=9)

    result = run_plan(plan, tmp_path, undisturbed(policy, tmp_path))

    assert (result.verdict, result.words) == ("survived", "")
    assert (result.clients_killed, result.trunks_killed) == (1, 1)
    assert sum(result.faults.values()) > 0
    assert result.reconnects > 0


def test_other_weights_and_other_errors_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(seed=1, policy="splitfed-v1", rate=0.0)
    wanted = undisturbed("splitfed-v1", tmp_path)
    name = next(iter(wanted))
    off = {**wanted, name: wanted[name] + torch.finfo(torch.float32).eps}
    assert run_plan(plan, tmp_path, off).words == f"weights differ in ['{name}']"
    assert run_plan(plan, tmp_path, {}).verdict == "lost"

    for error, verdict in (
        (RuntimeError("round 1 has no quorum: ..."), "ended"),
        (RuntimeError("some other trouble"), "lost"),
    ):

        def fails(self: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(chaos_run._Run, "tensors", fails)
        result = run_plan(plan, tmp_path, wanted)
        assert (result.verdict, result.words in str(error)) == (verdict, verdict == "ended")


def test_a_client_that_is_never_given_up_is_lost_in_words(tmp_path: Path) -> None:
    """All clients of a round die: no quorum, ever, is a documented end."""
    wanted = undisturbed("splitfed-v1", tmp_path)

    class Hopeless(chaos_run._Run):
        def must_die(self, session: str, call: int) -> bool:
            return session.startswith("train-1.") and session.endswith("-2") and call == 2

    run = chaos_run._Run
    chaos_run._Run = Hopeless  # type: ignore[misc]
    try:
        plan = Plan(seed=2, policy="splitfed-v1", rate=0.0, dying=(1, 1, 2))
        result = run_plan(plan, tmp_path, wanted)
    finally:
        chaos_run._Run = run  # type: ignore[misc]
    assert (result.verdict, result.words) == ("ended", "has no quorum")


@pytest.fixture
def summary() -> chaos.Summary:
    found = chaos.Summary()
    found.add(Plan(seed=1, policy="merged", rate=0.1), Result(faults={"lose": 2}, reconnects=3))
    found.add(
        Plan(seed=2, policy="merged", rate=0.1), Result(verdict="lost", words="weights differ")
    )
    found.add(
        Plan(seed=3, policy="merged", rate=0.1), Result(verdict="ended", words="has no quorum")
    )
    return found


def test_the_summary_names_what_was_lost(summary: chaos.Summary) -> None:
    told = json.loads(json.dumps(summary.as_dict()))
    assert (told["schedules"], told["survived"], told["faults_injected"]) == (3, 1, 2)
    assert told["lost"] == ["schedule 2 (merged, fp32, window 4): weights differ"]
    text = chaos.render(summary)
    assert "survived: 1" in text
    assert "1 x has no quorum" in text
    assert "lost: 1\n  schedule 2 (merged, fp32, window 4): weights differ" in text
