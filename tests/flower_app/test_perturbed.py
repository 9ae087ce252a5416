"""A secret perturbation of the embedding: a run with it is a plain run of a model that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.rules import ConfigError
from conf.schema import PrivacyConfig
from flower_app.beside import kept_privacy
from flower_app.build import build_client
from flower_app.client.noisy import noisy_ends
from flower_app.client.perturbed import EMBEDDING, HEAD, fold, perturb, perturbation
from flower_app.client.site_key import SiteKey, read_site_key
from flower_app.exports.unmask import unmask
from models import Cut, Parts, build_scratch, client_state, split
from tests.flower_app import test_app
from tests.flower_app.test_masked import DEFENDED, EXACT, _flower_task, grid_of, key  # noqa: F401


def through(parts: Parts, ids_BT: Tensor) -> Tensor:
    """Logits (B, T, V) of all three."""
    logits_BTV: Tensor = parts.top(parts.trunk(parts.bottom(ids_BT)))
    return logits_BTV


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_what_the_folded_model_computes(tied: bool, tmp_path: Path) -> None:
    config = test_app.tiny_config(tmp_path)
    whole = build_scratch({**config.model.scratch, "tie_word_embeddings": tied}, seed=3).eval()
    parts = split(whole, Cut(1, 1))
    ids_BT = torch.arange(12).reshape(2, 6)
    own, plain_BTV = SiteKey(bytes(32)), through(parts, ids_BT)
    for _ in range(2):  # once, however often it is asked for
        perturb(parts.bottom, parts.top, own, 2.0)
    perturbed_BTV = through(parts, ids_BT)
    embedding_VD = perturbation(parts.bottom.model, own, 2.0, EMBEDDING)
    head_VD = perturbation(parts.top.model, own, 2.0, HEAD)
    unit = parts.bottom.config.initializer_range
    assert float(embedding_VD.std()) == pytest.approx(2 * unit, rel=0.05)
    assert float((embedding_VD * head_VD).mean()) == pytest.approx(0.0, abs=0.1 * unit**2)
    other_VD = perturbation(parts.top.model, SiteKey(bytes([1]) * 32), 2.0, HEAD)
    assert not torch.allclose(other_VD, head_VD, atol=unit)
    perturb(parts.bottom, parts.top, own, 0.0)
    assert torch.equal(through(parts, ids_BT), plain_BTV)
    fold(whole, own, 2.0)
    assert torch.allclose(whole(ids_BT).logits, perturbed_BTV, atol=1e-6)
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
        ("base", key, f"privacy.ends=masked privacy.perturb=3 {DEFENDED}"),
        ("base", key, "privacy.ends=masked"),
    ):
        words = f"{changes} model.path={tmp_path / name} {more}"
        config = test_app.tiny_config(tmp_path, words, "lora")
        _, metrics, _ = runs[more] = test_app.run(config, grid_of(tmp_path, file))
        losses[more] = [r["evaluate"]["loss"] for r in metrics if r["kind"] == "round"]
    plain, perturbed, other = losses.values()
    assert perturbed == pytest.approx(plain, abs=2e-6)
    assert other != pytest.approx(plain, abs=1e-3)

    run = runs[f"privacy.ends=masked privacy.perturb=3 {DEFENDED}"][0]
    made = unmask(str(run), key, tmp_path / "model")
    assert kept_privacy(made).clip == 1e6
    found = load_file(made / "model.safetensors")
    folded = load_file(tmp_path / "folded" / "model.safetensors")
    assert found.keys() == folded.keys()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.allclose(found[name], folded[name], atol=1e-6)


def test_a_key_that_the_server_sees_through_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set privacy.ends=masked"):
        test_app.tiny_config(tmp_path, "privacy.perturb=1")
    config = test_app.tiny_config(tmp_path)
    bottom, top = build_client(config)
    bottom.config.initializer_range = 0.0
    with pytest.raises(ValueError, match=r"privacy.perturb=1 is in multiples of initializer_range"):
        perturb(bottom, top, SiteKey(bytes(32)), 1.0)


def test_an_embedding_that_does_more_than_look_up_is_refused(tmp_path: Path) -> None:
    """Gemma's multiplies: what is folded would not be what was trained with."""
    bottom, top = build_client(test_app.tiny_config(tmp_path))

    class Scaled(torch.nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 2.0 * super().forward(ids)

    bottom.model.set_input_embeddings(Scaled(259, bottom.config.hidden_size))
    with pytest.raises(ValueError, match=r"the embedding of \w+ \(Scaled\) is more than that"):
        perturb(bottom, top, SiteKey(bytes(32)), 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_ends_on_an_accelerator_are_perturbed_and_noised_as_here(tmp_path: Path) -> None:
    config = test_app.tiny_config(tmp_path)
    privacy = PrivacyConfig(update_clip=0.1, update_noise=1.0)
    ids_BT, found = torch.arange(12).reshape(2, 6), []
    for device in ("cpu", "cuda"):
        parts = split(build_scratch(config.model.scratch, seed=3).eval(), Cut(1, 1))
        ends = [part.to(device) for part in (parts.bottom, parts.top)]
        start = {name: t.cpu() + 0.01 for name, t in client_state(*ends).items()}
        perturb(ends[0], ends[1], SiteKey(bytes(32)), 2.0)
        sent = noisy_ends(privacy, start, client_state(*ends), bytes(32), "1")
        found.append([ends[0](ids_BT.to(device)).cpu(), *sent.values()])
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)
