"""Nodes that state their own cut and rank: what is served, what is refused, what is exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.load import to_json
from conf.schema import Config
from flower_app.build import (
    build_client,
    build_trunk,
    describe,
    num_blocks,
    take_residuals,
)
from flower_app.client.node import own_config
from flower_app.client.site import Site
from flower_app.export import export_model
from models import (
    Cut,
    build_scratch,
    client_state,
    fold_residuals,
    in_ends,
    load_client_state,
    load_trainable_state,
    trainable_state,
)
from strategies.records import ARRAYS, CONFIG, TICKET, to_arrays
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.test_app import held_out_loss, run, site_steps, tiny_config
from tests.strategies.helpers import fed_avg_round, largest_difference

LORA = "tuning.bottom=lora tuning.trunk=lora tuning.top=lora"
IDS = torch.arange(3, 30)[None]


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def configured(tmp_path: Path, changes: str = "") -> Config:
    return tiny_config(tmp_path, changes)


@pytest.mark.parametrize(
    ("changes", "node", "words"),
    [
        ("", {"cut-bottom": 0}, r"cut-bottom=0 .*trunk starts at block 1.*run with cut.bottom=0"),
        ("", {"cut-top": 0}, r"cut-top=0 .*leaves only the last 1 blocks.*run with cut.top=0"),
        ("", {"cut-bottom": -1}, "cut-bottom .*whole number, 0 or more, got -1"),
        ("", {"cut-top": 1.0}, "cut-top .*whole number, 0 or more, got 1.0"),
        ("", {"cut-bottom": "2"}, "cut-bottom .*whole number, 0 or more, got '2'"),
        ("", {"cut-top": True}, "cut-top .*whole number, 0 or more, got True"),
        (
            "",
            {"cut-bottom": 2, "cut-top": 2},
            "cut-bottom=2 and cut-top=2 .*no block to the trunk: the model has 4",
        ),
        (
            "train.strategy=splitfed-v2",
            {"cut-bottom": 2},
            "cut-bottom=2 .*run has cut.bottom=1: under train.strategy=splitfed-v2.*splitfed-v1",
        ),
        (
            "train.strategy=merged",
            {"cut-top": 2},
            "cut-top=2 .*run has cut.top=1: under train.strategy=merged.*splitfed-v1",
        ),
        (
            "tuning.bottom=frozen",
            {"cut-bottom": 2},
            "cut-bottom=2 .*tuning.bottom=frozen differs from tuning.trunk=full",
        ),
        (
            "tuning.top=lora",
            {"cut-top": 2},
            "cut-top=2 .*tuning.top=lora differs from tuning.trunk=full",
        ),
        (LORA, {"lora-rank": 4}, "lora-rank=4 .*lora.rank=8: aggregation.lora=factors.*exact or"),
        (f"{LORA} aggregation.lora=ffa", {"lora-rank": 4}, "lora-rank=4 .*aggregation.lora=ffa"),
        (LORA, {"lora-rank": 0}, "lora-rank .*whole number, 1 or more, got 0"),
        ("", {"lora-rank": "four"}, "lora-rank .*whole number, 1 or more, got 'four'"),
        ("", {"model-path": "/a/model"}, "model-path .*starts from model.scratch"),
    ],
)
def test_what_a_run_cannot_serve_is_refused_in_words(
    changes: str, node: dict[str, Any], words: str, tmp_path: Path
) -> None:
    config = configured(tmp_path, changes)
    with pytest.raises(ValueError, match=words):
        own_config(config, node)


def test_a_node_that_states_nothing_has_the_run_as_it_is(tmp_path: Path) -> None:
    for changes in ("", "train.strategy=splitfed-v2", f"{LORA} aggregation.lora=ffa"):
        config = configured(tmp_path, changes)
        usual = {"cut-bottom": 1, "cut-top": 1, "lora-rank": 8, "name": "site", "partition-id": 3}
        assert own_config(config, {}) == own_config(config, usual) == config


def test_statements_that_a_run_can_serve_change_that_alone(tmp_path: Path) -> None:
    config = configured(tmp_path, "tuning.bottom=full tuning.trunk=full tuning.top=frozen")
    own = own_config(config, {"cut-bottom": 2})
    assert (own.cut.bottom, own.cut.top) == (2, 1)
    assert replace(own, cut=config.cut) == config
    for how in ("exact", "svd"):
        config = configured(tmp_path, f"{LORA} aggregation.lora={how}")
        own = own_config(config, {"lora-rank": 2, "cut-top": 2})
        assert (own.lora.rank, own.cut.top) == (2, 2)
        assert replace(own, cut=config.cut, lora=config.lora) == config


def test_a_rank_counts_only_where_a_client_has_adapters(tmp_path: Path) -> None:
    """A node states what it can hold for all runs; one without adapters is none of its rank's."""
    for changes in ("", "tuning.bottom=frozen tuning.trunk=lora tuning.top=frozen"):
        config = configured(tmp_path, changes)
        assert own_config(config, {"lora-rank": 2}) == config


def test_the_blocks_are_counted_without_the_weights(tmp_path: Path) -> None:
    config = configured(tmp_path)
    build_scratch(config.model.scratch, 0).save_pretrained(tmp_path / "base")
    save_file({}, tmp_path / "base" / "model.safetensors")
    path = replace(config.model, scratch={}, path=str(tmp_path / "base"))
    assert num_blocks(config) == num_blocks(replace(config, model=path)) == 4
    gguf = replace(config.model, scratch={}, path="/a/model.gguf")
    assert num_blocks(replace(config, model=gguf)) is None


def test_parts_of_one_model_are_described_alike_wherever_they_are_cut(tmp_path: Path) -> None:
    config = configured(tmp_path)
    bottom, top = build_client(own_config(config, {"cut-bottom": 2}))
    assert describe(bottom) == describe(top) == describe(build_trunk(config))
    assert "cut" not in describe(bottom)


def site(config: Config, node: dict[str, Any], state: dict[str, Tensor] | None = None) -> Site:
    ticket = ConfigRecord({"round": 1, "rounds": 2, "model": describe(build_trunk(config))})
    shared = ConfigRecord({"json": to_json(config)})
    arrays = to_arrays(state) if state else ArrayRecord()
    content = RecordDict({ARRAYS: arrays, CONFIG: shared, TICKET: ticket})
    return Site(Message(content, 1, "train"), Context(1, 1, node, RecordDict(), {}))


@pytest.mark.parametrize("node", [{}, {"cut-bottom": 2}, {"cut-top": 2, "lora-rank": 3}], ids=str)
def test_a_site_builds_what_its_node_states(node: dict[str, Any], tmp_path: Path) -> None:
    config = configured(tmp_path, f"{LORA} aggregation.lora=exact")

    bottom, top = site(config, node).parts()

    cut = Cut(int(node.get("cut-bottom", 1)), int(node.get("cut-top", 1)))
    assert bottom.cut == top.cut == cut
    state = client_state(bottom, top)
    ranks = {t.shape[0] for n, t in state.items() if ".lora_A." in n}
    assert ranks == {int(node.get("lora-rank", 8))}
    assert {int(n.split(".")[2]) for n in state} == {*range(cut.bottom), *range(4 - cut.top, 4)}


def test_a_site_adds_residuals_to_the_original_weights_each_time(tmp_path: Path) -> None:
    config = configured(tmp_path, f"{LORA} aggregation.lora=exact")
    bottom, top = site(config, {"cut-bottom": 2}).parts()
    state = {name: tensor + 0.1 for name, tensor in client_state(bottom, top).items()}
    name = "model.layers.1.mlp.up_proj"
    before = bottom.model.get_submodule(name).get_base_layer().weight.detach().clone()
    residual = torch.randn(before.shape)

    for _ in range(2):
        own = site(config, {"cut-bottom": 2}, {**state, f"{name}.residual": residual})
        bottom, top = own.parts()

        weight = bottom.model.get_submodule(name).get_base_layer().weight
        torch.testing.assert_close(weight, before + residual, rtol=0, atol=1e-6)
        assert all(torch.equal(t, state[n]) for n, t in client_state(bottom, top).items())

    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj.*has no linear layer"):
        site(
            config, {}, {**state_of(config), "model.layers.2.mlp.up_proj.residual": residual}
        ).parts()


def state_of(config: Config) -> dict[str, Tensor]:
    return client_state(*build_client(config))


def trained(config: Config) -> dict[str, Tensor]:
    """Tensors of all three parts, moved from where they start."""
    state = {**state_of(config), **trainable_state(build_trunk(config))}
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def logits_of(config: Config, state: dict[str, Tensor]) -> Tensor:
    """Logits of the three parts that hold `state`, the residuals among it."""
    bottom, top = build_client(config)
    trunk = build_trunk(config)
    residuals, state = take_residuals(state)
    of_trunk = {n: t for n, t in state.items() if n in trainable_state(trunk)}
    load_trainable_state(trunk, of_trunk)
    load_client_state(bottom, top, {n: t for n, t in state.items() if n not in of_trunk})
    fold_residuals((bottom, trunk, top), residuals)
    with torch.no_grad():
        return top(trunk(bottom.eval()(IDS)))


def on_checkpoint(tmp_path: Path, changes: str) -> Config:
    scratch = configured(tmp_path).model.scratch
    build_scratch(scratch, 3).save_pretrained(tmp_path / "base")
    return tiny_config(
        tmp_path, f"model.path={tmp_path / 'base'} model.tokenizer=bytes {changes}", "lora"
    )


def test_a_run_with_frozen_lora_a_is_exported_as_a_whole_adapter(tmp_path: Path) -> None:
    config = on_checkpoint(tmp_path, "aggregation.lora=ffa")
    state = trained(config)
    assert state
    assert all(".lora_B." in name for name in state)

    folder = export_model(config, state, None, tmp_path / "model")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    got = PeftModel.from_pretrained(plain, folder).eval()(IDS).logits
    torch.testing.assert_close(got, logits_of(config, state), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["checkpoint", "scratch"])
def test_a_run_with_residuals_is_exported_whole(start: str, tmp_path: Path) -> None:
    """One adapter of the run's rank cannot hold them."""
    if start == "checkpoint":
        config = on_checkpoint(tmp_path, "aggregation.lora=exact")
    else:
        config = configured(tmp_path, f"{LORA} aggregation.lora=exact")
    state = trained(config)
    adapters = logits_of(config, state)
    state |= {f"model.layers.{i}.self_attn.q_proj.residual": torch.randn(16, 16) for i in range(4)}

    folder = export_model(config, state, None, tmp_path / "model")

    assert not (folder / "adapter_config.json").exists()
    got = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    torch.testing.assert_close(got, logits_of(config, state), rtol=0, atol=1e-5)
    assert (got - adapters).abs().max() > 1e-3


def test_ends_and_trunk_share_the_tensors_by_name(tmp_path: Path) -> None:
    """What the server may send to whom: each trained tensor is at exactly one of both."""
    config = configured(tmp_path)
    trunk = build_trunk(config)
    form: dict[str, Any] = {"block_list": trunk.block_list, "num_blocks": trunk.num_blocks_total}
    for node in ({}, {"cut-bottom": 2}, {"cut-top": 2}):
        own = own_config(config, node)
        cut = Cut(own.cut.bottom, own.cut.top)
        ends = {name for name in trained(config) if in_ends(name, cut=cut, **form)}
        assert ends == state_of(own).keys()


CUTS = ({}, {"cut-bottom": 2}, {"cut-top": 2})


def sites(tmp_path: Path, stated: tuple[dict[str, Any], ...]) -> InProcessGrid:
    """Nodes with files of unequal size and statements of their own."""
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    grid = InProcessGrid(clients=len(stated))
    for number, node in enumerate(stated):
        own = tmp_path / f"{number}.jsonl"
        own.write_text("\n".join(lines[6 * number : 7 * number + 2]), encoding="utf-8")
        grid.node_configs[number] = {"data-path": str(own), "name": f"site-{number}", **node}
    return grid


def test_three_nodes_of_three_cuts_equal_fedavg_of_unsplit_models(tmp_path: Path) -> None:
    config = configured(
        tmp_path, "train.lr=0.01 train.warmup=0 train.local_steps=0 data.max_examples=0"
    )
    grid = sites(tmp_path, CUTS)

    folder, metrics, _ = run(config, grid)

    assert metrics[-1]["clients"] == ["site-0", "site-1", "site-2"]
    whole = build_scratch(config.model.scratch, config.seed)
    for round in (1, 2):
        cohort = [
            site_steps(config, str(grid.node_configs[number]["data-path"]), f"site-{number}", round)
            for number in range(3)
        ]
        fed_avg_round(whole, cohort, config.train, round, 2)
    saved = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert largest_difference(saved, whole) < 1e-4


def test_nodes_of_three_ranks_and_cuts_leave_the_model_that_was_evaluated(tmp_path: Path) -> None:
    config = configured(tmp_path, f"{LORA} aggregation.lora=exact train.lr=0.01")
    ranks = ({"lora-rank": 2}, {"lora-rank": 16, "cut-bottom": 2}, {"cut-top": 2})
    stated = tuple({**r, "partition-id": n, "num-partitions": 3} for n, r in enumerate(ranks))
    grid = InProcessGrid(clients=3, node_configs=dict(enumerate(stated)))

    folder, metrics, _ = run(config, grid)

    assert metrics[-1]["clients"] == ["client-0", "client-1", "client-2"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert held_out_loss(model, config, 3) == pytest.approx(
        metrics[-1]["evaluate"]["loss"], abs=1e-5
    )


def test_a_node_that_cannot_take_part_is_named_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = configured(tmp_path, "train.rounds=1 train.local_steps=1")

    _, metrics, _ = run(config, sites(tmp_path, ({}, {}, {"cut-bottom": 0})))

    assert metrics[-1]["clients"] == ["site-0", "site-1"]
    assert "cut-bottom=0 in this node's config: the trunk starts at block 1" in caplog.text
