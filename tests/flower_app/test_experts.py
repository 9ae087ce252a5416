"""A whole run with adapters on experts: what is told, averaged, saved and evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conf.schema import Config
from flower_app.build import build_client, build_trunk
from models import adapted_shares
from models.tiny import roughen, tiny_config
from models.whole import build_scratch
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.test_app import _flower_task, held_out_loss, run
from tests.flower_app.test_app import tiny_config as configured

__all__ = ["_flower_task"]


def mixture(tmp_path: Path, changes: str) -> Config:
    """A run on a tiny model with shared and routed experts that reads bytes."""
    sizes = {"vocab_size": 259, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}
    model = roughen(build_scratch(tiny_config("glm4_moe", **sizes), 0, attention="eager"))
    model.save_pretrained(tmp_path / "base")
    path = (
        f"model.path={tmp_path / 'base'} model.tokenizer=bytes model.attention=eager train.lr=0.01"
    )
    return configured(tmp_path, f"{path} lora.rank=2 train.lr=0.01 {changes}", experiment="lora")


@pytest.mark.parametrize("how", ["factors", "svd", "ffa"])
def test_the_saved_adapter_is_the_model_that_was_evaluated(how: str, tmp_path: Path) -> None:
    config = mixture(tmp_path, f"aggregation.lora={how}")

    folder, metrics, lines = run(config, InProcessGrid(clients=2))

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, folder / "model").eval()
    evaluated = [m["evaluate"]["loss"] for m in metrics if m["kind"] == "round"]
    assert held_out_loss(model, config) == pytest.approx(evaluated[-1], abs=1e-5)
    assert abs(evaluated[-1] - evaluated[0]) > 1e-3
    saved = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert any(name.endswith(".experts.down_proj") for name in saved["target_parameters"])
    told = json.loads((folder / "summary.json").read_text())["adapted"]
    assert told.keys() == {"bottom", "trunk", "top"}
    assert told["trunk"] > 0.9
    assert any(f"{told['trunk']:.0%} of the trunk" in line for line in lines)


def test_nodes_of_three_ranks_leave_the_model_that_was_evaluated(tmp_path: Path) -> None:
    config = mixture(tmp_path, "aggregation.lora=exact")
    ranks = ({"lora-rank": 1}, {"lora-rank": 3, "cut-bottom": 2}, {"cut-top": 2})
    stated = [{**own, "partition-id": n, "num-partitions": 3} for n, own in enumerate(ranks)]

    folder, metrics, _ = run(config, InProcessGrid(3, node_configs=dict(enumerate(stated))))

    assert metrics[-1]["clients"] == ["client-0", "client-1", "client-2"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    assert held_out_loss(model.eval(), config, 3) == pytest.approx(
        metrics[-1]["evaluate"]["loss"], abs=1e-5
    )


def test_a_target_that_matches_nothing_is_refused_at_the_server_and_at_clients(
    tmp_path: Path,
) -> None:
    config = mixture(tmp_path, "lora.target_modules=[q_prj]")
    for build in (build_trunk, build_client):
        with pytest.raises(ValueError, match=r"lora\.target_modules: 'q_prj' is no linear layer"):
            build(config)


def test_every_part_tells_the_same_shares(tmp_path: Path) -> None:
    config = mixture(tmp_path, "tuning.top=frozen")
    modes = {"bottom": "lora", "trunk": "lora", "top": "frozen"}
    bottom, top = build_client(config)
    told = [adapted_shares(p, modes, config.lora) for p in (bottom, build_trunk(config), top)]
    assert told[0] == told[1] == told[2]
    assert told[0].keys() == {"bottom", "trunk"}
