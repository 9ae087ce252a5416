"""An adapter as the start: the parts compute what PEFT computes from the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from conf.schema import LoraSettings
from models import Cut, load_client, load_part, named_trainable, outline, save_adapter, tune
from models.continued import check_adapted, merge_adapter, take_over
from models.parts import split_unchecked
from models.state import copy_into
from tests.models.helpers import ids, run, saved, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)
LORA = LoraSettings(rank=2, alpha=6.0)


def peft_adapter(folder: Path, family: str, **settings: Any) -> Tensor:
    """Save a base and a rough adapter of it with PEFT; return the logits of both together."""
    base = saved(folder / "base", family)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "adapter")
    return model.eval()(ids()).logits


def loaded(folder: Path) -> list[Any]:
    bottom, top = load_client(str(folder / "base"), CUT, attention="eager")
    return [bottom, load_part("trunk", str(folder / "base"), CUT, attention="eager"), top]


def trained_by(model: Any, lora: LoraSettings = LORA) -> dict[str, Tensor]:
    trained: dict[str, Tensor] = {}
    for part in split_unchecked(model, CUT):
        trained.update(named_trainable(tune(part, "lora", lora=lora)))
    return trained


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": ["down_proj"], "rank_pattern": {"down_proj": 3}}),
        ("llama", {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]}),
        ("llama", {"target_modules": ["up_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_merged_adapter_gives_pefts_logits(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    want = peft_adapter(tmp_path, family, **settings)
    parts = loaded(tmp_path)
    check_adapted(tmp_path / "adapter", outline(str(tmp_path / "base")))
    for part in parts:
        merge_adapter(part, tmp_path / "adapter")
        assert not any("lora_" in name for name, _ in part.named_parameters())
        tune(part, "lora", lora=LORA)
    torch.testing.assert_close(run(parts, ids()), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_an_adapter_of_the_same_settings_is_trained_on(family: str, tmp_path: Path) -> None:
    saved(tmp_path / "base", family)
    values = trained_by(tiny(family))
    with torch.no_grad():
        for tensor in values.values():
            tensor += 0.1 * torch.randn(tensor.shape)
    save_adapter(tmp_path / "adapter", values, base=str(tmp_path / "base"), lora=LORA)

    whole = outline(str(tmp_path / "base"))
    first = take_over(tmp_path / "adapter", whole, trained_by(whole), LORA)

    assert first is not None
    assert all(torch.equal(first[name], values[name]) for name in values)
    parts = loaded(tmp_path)
    for part in parts:
        own = named_trainable(tune(part, "lora", lora=LORA))
        copy_into(own, {name: first[name] for name in own}, part.role)
    peft = PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    torch.testing.assert_close(run(parts, ids()), peft(ids()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        LoraSettings(rank=4, alpha=6.0),
        LoraSettings(rank=2, alpha=8.0),
        LoraSettings(rank=2, alpha=6.0, target_modules=("q_proj",)),
    ],
)
def test_an_adapter_of_other_settings_is_another_one(lora: LoraSettings, tmp_path: Path) -> None:
    saved(tmp_path / "base")
    save_adapter(tmp_path / "a", trained_by(tiny("llama")), base=str(tmp_path / "base"), lora=LORA)
    whole = outline(str(tmp_path / "base"))
    assert take_over(tmp_path / "a", whole, trained_by(whole), LORA) is not None
    assert take_over(tmp_path / "a", whole, trained_by(whole, lora), lora) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "changes lm_head.*merge it once"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "changes lm_head"),
    ],
)
def test_adapters_beyond_the_blocks_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    peft_adapter(tmp_path, "llama", **settings)
    with pytest.raises(ValueError, match=words):
        check_adapted(tmp_path / "adapter", outline(str(tmp_path / "base")))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    peft_adapter(tmp_path, "llama", target_modules=["q_proj"])
    saved(tmp_path / "other", "gpt2")
    with pytest.raises(ValueError, match=r"does not have; set model\.base"):
        check_adapted(tmp_path / "adapter", outline(str(tmp_path / "other")))
