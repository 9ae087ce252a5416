"""`graft parity --all`: what it says is true, also when Graft is broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from simulations.cli import app as cli
from simulations.equality import report as equivalence
from simulations.equality.claims import CLAIMS
from simulations.equality.federation import Gap
from simulations.equality.report import EquivalenceReport, run_equivalence
from simulations.equality.trial import Claim, NotTriedError
from strategies.engine.bench import Bench
from strategies.engine.lane import Lane, OwnLane
from strategies.engine.member import Member
from strategies.engine.policies.group import Group
from tests.models.helpers import saved

pytestmark = pytest.mark.usefixtures("one_thread")


def chosen(*words: str, optimizer: str = "") -> list[Claim]:
    """Claims whose text has all words."""
    found = [c for c in CLAIMS if all(w in c.text for w in words) and optimizer in c.optimizer]
    assert found
    return found


def verdicts(claims: Sequence[Claim]) -> list[str]:
    return [row.verdict for row in run_equivalence(claims=claims, families=["llama"]).rows]


def check_all_equal(report: EquivalenceReport, claims: Sequence[Claim], models: int) -> None:
    assert [row.verdict for row in report.rows] == ["equal"] * models * len(claims)
    assert report.ok
    table = equivalence.render(report)
    assert all(claim.text in table for claim in claims)
    assert "all equal" in table


@pytest.mark.slow
def test_each_claim_stands_on_a_tiny_model() -> None:
    """With one optimizer each; `graft parity --all`, which CI runs as well, has all of them."""
    claims = list({claim.text: claim for claim in reversed(CLAIMS)}.values())
    report = run_equivalence(claims=claims, families=["llama"])
    check_all_equal(report, claims, models=1)


@pytest.mark.slow
def test_every_row_stands() -> None:
    check_all_equal(run_equivalence(), CLAIMS, models=2)


def identity(self: Lane, step: int, micro: int, grad: Tensor, *, last: bool, tokens: int) -> Any:
    """A backward that hands the gradient through, and leaves the trunk as it is."""
    return grad, 0.0


def unweighted(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Every client's gradient counts as one with as many tokens as the others'."""

    def wrong(self: Group, member: Member, grad: Tensor, tokens: int, *, last: bool) -> Any:
        return backward(self, member, grad, 16, last=last)

    return wrong


def test_an_identity_backward_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnLane, "backward", identity)
    claims = [*chosen("one client = unsplit"), *chosen("splitfed-v1 =")]
    assert verdicts(claims) == ["NOT EQUAL"] * 5


def test_a_dropped_token_weight_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "backward", unweighted(Group.backward))
    assert verdicts(chosen("centralised")) == ["NOT EQUAL"] * 4


def test_a_dropped_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Bench.forward
    monkeypatch.setattr(
        Bench, "forward", lambda self, module, h, mask: forward(self, module, h, None)
    )
    assert verdicts(chosen("one client = unsplit", optimizer="sgd")) == ["NOT EQUAL"]


def test_a_mean_without_weights_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from strategies.aggregate import state as averaging

    monkeypatch.setattr(averaging, "shares_of", lambda weights, count: [1 / count] * count)
    claims = [*chosen("three cuts", optimizer="sgd"), *chosen("exact LoRA")]
    assert verdicts(claims) == ["NOT EQUAL"] * 2


def test_a_proximal_term_left_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.engine.lane.add_proximal", lambda *args: None)
    assert verdicts(chosen("FedProx")) == ["NOT EQUAL"]


def test_messages_that_lose_a_moment_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from flower_app.client.ends import Ends

    monkeypatch.setattr(Ends, "optimizer_state", lambda self: {})
    assert verdicts(chosen("stream = messages: splitfed-v2")) == ["NOT EQUAL"]


def report_of(*measures: Callable[..., Gap]) -> EquivalenceReport:
    claims = [Claim(f"claim {i}", measure, 1e-5) for i, measure in enumerate(measures)]
    return run_equivalence(claims=claims, families=["llama"])


def raising(error: Exception, *_: Any) -> Gap:
    raise error


def test_what_is_not_tried_says_why_and_fails_nothing() -> None:
    report = report_of(lambda *_: Gap(0.0), partial(raising, NotTriedError("too few blocks")))

    assert [row.verdict for row in report.rows] == ["equal", "not tried"]
    assert report.ok
    assert "too few blocks" in equivalence.render(report)
    assert not report_of(partial(raising, NotTriedError("too few blocks"))).ok
    assert not EquivalenceReport().ok


@pytest.mark.parametrize(
    ("measure", "verdict"),
    [
        (lambda *_: Gap(float("nan")), "NOT EQUAL"),
        (lambda *_: Gap(2e-5, 1.0), "NOT EQUAL"),
        (lambda *_: Gap(0.0, 1e-5), "SAYS NOTHING"),
        (partial(raising, RuntimeError("no quorum")), "FAILED"),
    ],
)
def test_bad_news_is_told(measure: Callable[..., Gap], verdict: str) -> None:
    report = report_of(lambda *_: Gap(0.0), measure)
    assert report.rows[1].verdict == verdict
    assert not report.ok
    assert "1 NOT EQUAL" in equivalence.render(report)


def test_a_large_model_trains_adapters_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "llama")
    monkeypatch.setattr("simulations.equality.subjects.LARGE", 1)

    report = run_equivalence(str(tmp_path), claims=chosen("splitfed-v1 ="))

    assert [row.trains for row in report.rows] == ["LoRA, SGD", "LoRA, AdamW, eps 1e-05"]
    assert report.ok


def test_the_command_ends_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "CLAIMS", chosen("one client", optimizer="sgd"))

    good = CliRunner().invoke(cli.app, ["parity", "--all", "--json"])
    monkeypatch.setattr(OwnLane, "backward", identity)
    bad = CliRunner().invoke(cli.app, ["parity", "--all"])

    assert good.exit_code == 0
    assert {row["verdict"] for row in json.loads(good.stdout)["rows"]} == {"equal"}
    assert bad.exit_code == 1
    assert "2 NOT EQUAL" in bad.stdout
    refused = CliRunner().invoke(cli.app, ["parity", "--all", "--families"])
    assert refused.exit_code == 2
    assert "leave out --families and --cut" in refused.stderr
