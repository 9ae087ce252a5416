"""What `graft bench speculate` and `graft bridge` do, in small: a model, its bridge, the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from models.bridge import load_bridge
from simulations.cli.app import app
from tests.simulations.talk.helpers import bytes_tokenizer, family

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_bridge_is_made_and_measured(tmp_path: Path) -> None:
    model, text = tmp_path / "tiny", tmp_path / "text.txt"
    family("llama", max_position_embeddings=128).save_pretrained(model)
    bytes_tokenizer().save_pretrained(model)
    text.write_text("A bridge leads from one bank to the other. " * 40, encoding="utf-8")

    how = "--steps 50 --width 16 --batch-size 2 --context 32 --cut 1,1"
    made = _graft(f"bridge {model} --to {tmp_path} --data {text} {how}")
    assert made.exit_code == 0, made.output
    assert "misses" in made.stderr
    assert load_bridge(tmp_path, hidden_size=32).down.abs().max() > 1e-3

    how = f"--rtt 0,5 --prompts 1 --tokens 12 --data {text} --cut 1,1 --json"
    measured = _graft(f"bench speculate {model} --bridge {tmp_path} {how}")
    assert measured.exit_code == 0, measured.output
    table = json.loads(measured.stdout)
    rows = {name: row for name, row in table.items() if isinstance(row, dict)}
    assert len(rows) == 3 * 2 * 3
    for name, row in rows.items():
        assert row["tokens_per_trip"] >= 1
        if name.endswith("off"):
            assert row["tokens_per_trip"] == 1
            assert row["ms_per_token_at_5_ms"] >= 5
    assert rows["training, sampled, bridge"]["tokens_per_trip"] > 1.5


def _graft(line: str) -> Result:
    return CliRunner().invoke(app, line.split())
