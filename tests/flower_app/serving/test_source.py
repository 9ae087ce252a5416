"""What a name on the command line means, and that what is loaded by it is the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import ByT5Tokenizer, GenerationConfig, PreTrainedModel

from conf.load import load_config, to_yaml
from flower_app.runs.folders import runs_folder
from flower_app.serving.source import (
    Served,
    find_served,
    load_ends,
    load_tokenizer,
    load_trunk,
    load_trunks,
    load_whole_model,
)
from models import Cut, load_whole
from models.fingerprint import fingerprint
from tests.models.helpers import ids, run, saved

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)


def rough_adapter(folder: Path, base: Path, seed: int = 0) -> Path:
    """An adapter of `base`, as PEFT saves it."""
    model = get_peft_model(
        load_whole(str(base)), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def finished_run(name: str, model: Path, changes: str = "") -> Path:
    """A run folder as a finished run leaves it, with a copy of this model."""
    folder = runs_folder() / name
    shutil.copytree(model, folder / "model")
    config = load_config("demo", f"cut.bottom=2 cut.top=1 {changes}")
    (folder / "config.yaml").write_text(to_yaml(config))
    summary = {"status": "finished", "experiment": "demo", "model": "model", "rounds": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def split_logits(served: Served, trunk: torch.nn.Module | None = None) -> Tensor:
    bottom, top = load_ends(served)
    return run([bottom, trunk or load_trunk(served), top], ids())


def base_of(folder: Path, **changes: int) -> PreTrainedModel:
    model = saved(folder, **changes)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return model


def test_a_model_needs_a_cut(tmp_path: Path) -> None:
    whole = base_of(tmp_path / "base")
    with pytest.raises(ValueError, match="give the blocks that stay with the client, --cut"):
        find_served(str(tmp_path / "base"))

    served = find_served(str(tmp_path / "base"), CUT)

    assert (served.name, served.cut, served.hidden_size) == ("base", CUT, 32)
    assert served.description == "llama of 4 blocks x 32, vocabulary 96"
    torch.testing.assert_close(split_logits(served), whole(ids()).logits, rtol=0, atol=1e-5)
    assert not load_trunk(served).training
    assert load_trunk(served, dtype="bf16").dtype == torch.bfloat16


def test_what_is_nothing_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; nor is it a run under .*graft runs"):
        find_served(str(tmp_path / "nothing"), CUT)
    with pytest.raises(ValueError, match="no finished run of experiment 'demo'"):
        find_served("last:demo")


def test_a_run_knows_its_cut(tmp_path: Path) -> None:
    whole = base_of(tmp_path / "base")
    folder = finished_run("20260101-120000-demo", tmp_path / "base")

    found = [find_served(text) for text in (str(folder), folder.name, "last:demo")]

    assert len(set(found)) == 1
    assert found[0].cut == Cut(2, 1)
    assert found[0].run == folder
    assert found[0].name == folder.name
    assert find_served(str(folder / "model")) == found[0]
    assert find_served(folder.name, CUT).cut == CUT
    assert load_tokenizer(found[0]).vocab_size == ByT5Tokenizer(extra_ids=0).vocab_size
    torch.testing.assert_close(split_logits(found[0]), whole(ids()).logits, rtol=0, atol=1e-5)


def test_a_run_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    base_of(tmp_path / "base")
    folder = finished_run("20260101-120000-demo", tmp_path / "base")
    shutil.rmtree(folder / "model")
    with pytest.raises(ValueError, match="neither a model nor a checkpoint"):
        find_served(folder.name)
    (folder / "checkpoints" / "round-0003").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"checkpoint of round 3: `graft export .* --format merg"):
        find_served(folder.name)


def test_an_adapter_is_merged_into_each_part(tmp_path: Path) -> None:
    base_of(tmp_path / "base")
    adapter = rough_adapter(tmp_path / "adapter", tmp_path / "base")
    want = PeftModel.from_pretrained(load_whole(str(tmp_path / "base")), adapter).eval()(ids())

    served = find_served(str(adapter), CUT)

    assert served.adapter == adapter
    torch.testing.assert_close(split_logits(served), want.logits, rtol=0, atol=1e-5)
    whole = load_whole_model(served)
    torch.testing.assert_close(whole(ids()).logits, want.logits, rtol=0, atol=1e-5)
    assert not any("lora" in name for name in whole.state_dict())
    assert load_tokenizer(served) is not None


def test_adapters_of_one_base_share_its_weights(tmp_path: Path) -> None:
    base_of(tmp_path / "base")
    adapters = [rough_adapter(tmp_path / f"a{n}", tmp_path / "base", n) for n in range(2)]
    served = [find_served(str(path), CUT) for path in (tmp_path / "base", *adapters)]

    trunks = load_trunks(served)

    places = [
        {p.data_ptr() for n, p in trunk.named_parameters() if "lora_" not in n} for trunk in trunks
    ]
    assert places[0] == places[1] == places[2]
    for one, trunk in zip(served, trunks, strict=True):
        torch.testing.assert_close(split_logits(one, trunk), split_logits(one), rtol=0, atol=1e-5)
    assert not torch.allclose(split_logits(served[1]), split_logits(served[2]), atol=1e-3)
    assert not any(p.requires_grad for trunk in trunks for p in trunk.parameters())


def test_generation_settings_come_along(tmp_path: Path) -> None:
    base_of(tmp_path / "base")
    told = GenerationConfig(eos_token_id=[5, 7], temperature=0.25, do_sample=True)
    told.save_pretrained(tmp_path / "base")
    adapter = rough_adapter(tmp_path / "adapter", tmp_path / "base")

    for path in (tmp_path / "base", adapter):
        served = find_served(str(path), CUT)
        models = [load_whole_model(served), *(part.model for part in load_ends(served))]
        for model in models:
            assert model.generation_config.eos_token_id == [5, 7]
            assert model.generation_config.temperature == 0.25


def test_a_fingerprint_is_of_the_weights_and_not_of_their_files(tmp_path: Path) -> None:
    model = base_of(tmp_path / "base")
    first = fingerprint(str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "whole", max_shard_size="1GB")
    assert fingerprint(str(tmp_path / "whole")) == first
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.2" in n)[0, 3] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert fingerprint(str(tmp_path / "other")) != first

    adapters = [rough_adapter(tmp_path / f"a{n}", tmp_path / "base", n) for n in range(2)]
    found = {fingerprint(str(tmp_path / "base"), adapter) for adapter in adapters}
    assert len({first, *found}) == 3
    shutil.move(adapters[0], tmp_path / "moved")
    assert fingerprint(str(tmp_path / "base"), tmp_path / "moved") in found
