"""A secret perturbation of the embedding: a run with it is a plain run of a model that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conf.rules import ConfigError
from flower_app.build import build_client
from flower_app.client.perturbed import fold, perturb, perturbation
from flower_app.client.site_key import SiteKey, read_site_key
from flower_app.exports.unmask import unmask
from models import Cut, build_scratch, split
from tests.flower_app import test_app
from tests.flower_app.test_masked import EXACT, _flower_task, grid_of, key  # noqa: F401


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_what_the_folded_model_computes(tied: bool, tmp_path: Path) -> None:
    config = test_app.tiny_config(tmp_path)
    whole = build_scratch({**config.model.scratch, "tie_word_embeddings": tied}, seed=3).eval()
    bottom = split(whole, Cut(1, 1)).bottom
    ids_BT = torch.arange(12).reshape(2, 6)
    plain_BTV, own = whole(ids_BT).logits, SiteKey(bytes(32))
    plain_BTD = bottom(ids_BT)
    perturb(bottom, own, 2.0)
    perturb(bottom, own, 2.0)  # once, however often it is asked for
    perturbed_BTD = bottom(ids_BT)
    table_VD = perturbation(bottom.model, own, 2.0)
    assert float(table_VD.std()) == pytest.approx(2 * bottom.config.initializer_range, rel=0.05)
    assert not torch.equal(table_VD, perturbation(bottom.model, SiteKey(bytes([1]) * 32), 2.0))
    perturb(bottom, own, 0.0)
    assert torch.equal(bottom(ids_BT), plain_BTD)
    fold(whole, own, 2.0)
    assert torch.equal(split(whole, Cut(1, 1)).bottom(ids_BT), perturbed_BTD)
    whole.save_pretrained(tmp_path / "folded")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert torch.allclose(again(ids_BT).logits, whole(ids_BT).logits, atol=1e-6)
    assert not torch.allclose(again(ids_BT).logits, plain_BTV, atol=1e-3)


@pytest.mark.parametrize("transport", ["stream", pytest.param("messages", marks=pytest.mark.slow)])
def test_a_perturbed_run_is_a_plain_one_of_the_folded_model(
    transport: str,
    tmp_path: Path,
    key: Path,  # noqa: F811
) -> None:
    """Adapters are trained, so the embedding is the base's, with what was folded in."""
    base = build_scratch(test_app.tiny_config(tmp_path).model.scratch, seed=3)
    base.save_pretrained(tmp_path / "base")
    fold(base, read_site_key(key), 3.0)
    base.save_pretrained(tmp_path / "folded")
    changes = f"{EXACT} train.rounds=2 link.transport={transport} model.tokenizer=bytes lora.rank=2"
    runs, losses = {}, {}
    for name, file, more in (
        ("folded", None, "privacy.ends=plain"),
        ("base", key, "privacy.ends=masked privacy.perturb=3"),
        ("base", key, "privacy.ends=masked"),
    ):
        words = f"{changes} model.path={tmp_path / name} {more}"
        config = test_app.tiny_config(tmp_path, words, "lora")
        _, metrics, _ = runs[more] = test_app.run(config, grid_of(tmp_path, file))
        losses[more] = [r["evaluate"]["loss"] for r in metrics if r["kind"] == "round"]
    plain, perturbed, other = losses.values()
    assert perturbed == pytest.approx(plain, abs=2e-6)
    assert other != pytest.approx(plain, abs=1e-3)

    made = unmask(str(runs["privacy.ends=masked privacy.perturb=3"][0]), key, tmp_path / "model")
    found = load_file(made / "model.safetensors")
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    assert torch.allclose(
        found["model.embed_tokens.weight"], folded["model.embed_tokens.weight"], atol=1e-6
    )
    assert found.keys() == folded.keys()


def test_a_key_that_the_server_sees_through_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set privacy.ends=masked"):
        test_app.tiny_config(tmp_path, "privacy.perturb=1")
    config = test_app.tiny_config(tmp_path)
    bottom, _ = build_client(config)
    bottom.config.initializer_range = 0.0
    with pytest.raises(ValueError, match=r"privacy.perturb=1 is in multiples of initializer_range"):
        perturb(bottom, SiteKey(bytes(32)), 1.0)
