"""Runs that start from an adapter: where they begin, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from peft import PeftModel
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from conf.load import load_config
from conf.schema import Config
from flower_app.build import build_client, build_trunk, describe_start, resolve_model
from flower_app.client.node import own_config
from flower_app.export import assemble, export_model
from models import client_state, trainable_state
from models.whole import load_whole
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.test_app import run as run_app
from tests.flower_app.test_app import tiny_config
from tests.models.helpers import ids, run, saved

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = "lora.rank=2 lora.alpha=6"


@pytest.fixture(autouse=True)
def _flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def configured(folder: Path, changes: str = SAME) -> Config:
    return resolve_model(
        load_config("lora", f"model.path={folder} model.tokenizer=bytes cut.bottom=1 {changes}")
    )


def state_of(config: Config) -> dict[str, torch.Tensor]:
    return {**client_state(*build_client(config)), **trainable_state(build_trunk(config))}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """An adapter that Graft exported after training, of a base beside it."""
    saved(tmp_path / "base")
    config = configured(tmp_path / "base")
    state = {name: t + 0.1 * torch.randn(t.shape) for name, t in state_of(config).items()}
    return export_model(config, state, None, tmp_path / "adapter")


def logits(folder: Path) -> torch.Tensor:
    base = load_whole(str(folder.parent / "base"))
    return PeftModel.from_pretrained(base, folder).eval()(ids()).logits


def parts_of(config: Config) -> list[torch.nn.Module]:
    bottom, top = build_client(config)
    return [bottom.eval(), build_trunk(config).eval(), top.eval()]


@pytest.mark.parametrize(
    ("changes", "words", "adapter"),
    [
        (SAME, "training goes on from the adapter", True),
        ("lora.rank=3", "is merged into its base", False),
        (f"{SAME} aggregation.lora=ffa", "is merged into its base", False),
        ("tuning.bottom=full tuning.trunk=full tuning.top=full", "is merged", False),
    ],
)
def test_a_run_begins_where_the_adapter_ended_and_leaves_one_artefact(
    changes: str, words: str, adapter: bool, trained: Path, tmp_path: Path
) -> None:
    config = configured(trained, changes)
    parts = parts_of(config)

    assert words in describe_start(config)
    torch.testing.assert_close(run(parts, ids()), logits(trained), rtol=0, atol=1e-5)
    left = export_model(config, state_of(config), ByT5Tokenizer(), tmp_path / "left")
    assert (left / "adapter_config.json").exists() == adapter
    again = configured(left, changes)
    assert again.model.base == (str(tmp_path / "base") if adapter else "")
    torch.testing.assert_close(run(parts_of(again), ids()), logits(trained), rtol=0, atol=1e-5)
    whole = assemble(config, state_of(config)).eval()
    torch.testing.assert_close(whole(ids()).logits, logits(trained), rtol=0, atol=1e-5)


def test_a_base_that_moved_is_named_with_the_remedy(trained: Path, tmp_path: Path) -> None:
    want = logits(trained)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"its base {tmp_path}/base does not.*set model\.base"):
        configured(trained)
    config = configured(trained, f"{SAME} model.base={tmp_path / 'moved'}")
    torch.testing.assert_close(run(parts_of(config), ids()), want, rtol=0, atol=1e-5)


def test_a_base_that_the_hub_does_not_have_is_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(path_or_id: str) -> None:
        raise ValueError(f"cannot read the config of {path_or_id}")

    monkeypatch.setattr("flower_app.build.outline", unknown)
    with pytest.raises(ValueError, match=r"adapter of no/such-base: .*; set model\.base"):
        configured(trained, "model.base=no/such-base")


def test_what_is_no_model_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model.path /nope does not exist"):
        configured(Path("/nope"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is an empty folder"):
        configured(tmp_path / "empty")


def test_a_node_brings_its_own_copy_of_the_adapter_not_of_the_base(
    trained: Path, tmp_path: Path
) -> None:
    config, base = configured(trained), str(tmp_path / "base")
    with pytest.raises(ValueError, match="is no adapter, and the run starts from the adapter"):
        own_config(config, {"model-path": base})
    own = own_config(config, {"model-path": str(trained), "model-base": base}).model
    assert (own.path, own.base) == (str(trained), base)


def test_a_run_goes_on_with_the_adapter_of_the_run_before(tmp_path: Path) -> None:
    saved(tmp_path / "base", vocab_size=259)
    same = f"{SAME} model.tokenizer=bytes train.rounds=1 train.local_steps=2"
    first = tiny_config(tmp_path, f"model.path={tmp_path / 'base'} {same}", experiment="lora")
    run_app(first, InProcessGrid(clients=2))
    again = tiny_config(tmp_path, f"model.path=last:lora {same} train.lr=1e-9", experiment="lora")

    before = resolve_model(again).model
    folder, _, lines = run_app(again, InProcessGrid(clients=2))

    assert any("training goes on from the adapter" in line for line in lines)
    assert before.base == str(tmp_path / "base")
    settings = json.loads((folder / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    folders = (Path(before.path), folder / "model")
    old, new = (load_file(place / "adapter_model.safetensors") for place in folders)
    assert old.keys() == new.keys()
    assert all(float(tensor.norm()) > 1e-4 for tensor in old.values()), "it was trained"
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, rtol=0, atol=1e-6)


def test_a_trained_adapter_is_not_started_from_scratch(trained: Path) -> None:
    """The first values are the adapter's, not the seed's."""
    first, fresh = state_of(configured(trained)), state_of(configured(trained.parent / "base"))
    assert first.keys() == fresh.keys()
    assert not any(torch.equal(first[name], fresh[name]) for name in first)
