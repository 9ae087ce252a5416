"""Runs that start from an adapter: where they begin, and what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import ByT5Tokenizer

from conf.load import load_config
from conf.schema import Config
from flower_app.build import build_client, build_trunk, describe_start, resolve_model
from flower_app.export import assemble, export_model
from models import client_state, trainable_state
from models.whole import load_whole
from tests.models.helpers import ids, run, saved

pytestmark = pytest.mark.usefixtures("one_thread")
SAME = "lora.rank=2 lora.alpha=6"


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


def test_a_trained_adapter_is_not_started_from_scratch(trained: Path) -> None:
    """The first values are the adapter's, not the seed's."""
    first, fresh = state_of(configured(trained)), state_of(configured(trained.parent / "base"))
    assert first.keys() == fresh.keys()
    assert not any(torch.equal(first[name], fresh[name]) for name in first)
