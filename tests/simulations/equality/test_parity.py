"""`graft parity` and `graft bench memory`: what they report is true, also when it is bad news."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import Cut
from simulations.bench.memory import bench_memory, measure
from simulations.equality import parity
from tests.models.helpers import saved

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_saved_model_is_equal_on_the_cuts_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, "gpt2")
    report = parity.run_parity(str(tmp_path), [(2, 1), Cut(0, 0)], "both")
    assert report.ok
    assert len(report.rows) == 2 * 2 * 3
    assert {row.loaded for row in report.rows} == {"equal"}
    assert "all equal" in parity.render(report)


def test_all_cuts_of_a_shallow_model_by_default(tmp_path: Path) -> None:
    saved(tmp_path, "llama", num_hidden_layers=2)
    report = parity.run_parity(str(tmp_path), None, "eager")
    assert {row.cut for row in report.rows} == {"0,0", "0,1", "1,0"}


def test_bad_news_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama")
    honest = parity.split

    def wrong(model, cut, **options):  # type: ignore[no-untyped-def]
        parts = honest(model, cut, **options)
        parts.trunk.model.model.layers[1].self_attn.scaling *= 1.01
        return parts

    monkeypatch.setattr(parity, "split", wrong)
    report = parity.run_parity(str(tmp_path), [Cut(1, 1)], "eager")
    assert not report.ok
    assert "3 NOT EQUAL" in parity.render(report)


def test_parts_that_load_differently_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "a", "llama")
    saved(tmp_path / "b", "llama", rms_norm_eps=1e-3)
    other = tmp_path / "b"
    honest = parity.load_part
    monkeypatch.setattr(parity, "load_part", lambda r, p, c, **k: honest(r, str(other), c, **k))
    assert parity.run_parity(str(tmp_path / "a"), [Cut(1, 1)], "eager").ok
    saved(other, "llama", tie_word_embeddings=True, num_key_value_heads=4)
    report = parity.run_parity(str(tmp_path / "a"), [Cut(1, 1)], "eager")
    assert not report.ok
    assert report.rows[0].loaded.startswith("differ")


def test_families(monkeypatch: pytest.MonkeyPatch) -> None:
    report = parity.run_families(["gpt2", "gemma2"], attention="both", tokens=6)
    assert report.ok
    assert {row.model: row.attention for row in report.rows} == {"gpt2": "eager", "gemma2": "eager"}
    assert report.as_dict()["ok"] is True


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    with pytest.raises(ValueError, match="must be sdpa, eager or both"):
        parity.run_parity(str(tmp_path), None, "flash")
    with pytest.raises(ValueError, match="leaves no trunk"):
        parity.run_parity(str(tmp_path), [Cut(2, 2)], "eager")
    with pytest.raises(ValueError, match="absent does not exist"):
        parity.run_parity(str(tmp_path / "absent"), None)
    assert not parity.ParityReport().ok


def test_the_memory_of_a_role_is_measured(tmp_path: Path) -> None:
    saved(tmp_path, "llama", hidden_size=256, intermediate_size=1024, head_dim=64)
    figures = {role: measure(role, str(tmp_path), 1, 1) for role in ("bottom", "trunk", "top")}
    whole = measure("whole", str(tmp_path), 1, 1)["weights_mb"]
    assert sum(f["weights_mb"] for f in figures.values()) == pytest.approx(whole, abs=0.3)
    assert all(f["peak_mb"] >= 0 for f in figures.values())


@pytest.mark.slow
def test_no_role_takes_the_memory_of_the_whole_model() -> None:
    figures = bench_memory()
    for role in ("bottom", "trunk", "top"):
        own = figures[role]
        assert own["peak_mb"] < own["weights_mb"] + 0.15 * figures["whole"]["weights_mb"]
        assert own["share"] < 0.8
