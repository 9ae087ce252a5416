"""Residuals: what the rank of adapters cannot hold. FFA-LoRA: a lora_A that stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from conf.schema import LoraSettings
from models import (
    Cut,
    Parts,
    client_state,
    complete_pairs,
    fold_residuals,
    merge,
    outline,
    save_adapter,
    split,
    trainable_state,
    tune,
    tune_whole,
)
from models.adapters import block_linears
from tests.models.helpers import ids, run, saved, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)
LORA = LoraSettings(rank=3, alpha=6.0)


def tuned(family: str, *, freeze_a: bool = False) -> Parts:
    parts = split(tiny(family), CUT)
    for part in parts:
        tune(part, "lora", lora=LORA, seed=7, freeze_a=freeze_a)
    return parts


def residual_of(parts: Parts, seed: int = 0) -> dict[str, Tensor]:
    """A random (out, in) residual for every adapted layer."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for part in parts:
        for name in sorted({n.partition(".lora_")[0] for n in trainable_state(part)}):
            base = part.model.get_submodule(name).get_base_layer()
            shape = base.weight.T.shape if isinstance(base, Conv1D) else base.weight.shape
            found[f"{name}.residual"] = 0.1 * torch.randn(shape, generator=generator)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_a_residual_adds_to_what_a_layer_gives(family: str) -> None:
    parts, plain = tuned(family), tuned(family)
    residuals = residual_of(parts)
    assert len(residuals) == sum(len(block_linears(p)) for p in split(tiny(family), CUT))

    fold_residuals(
        (parts.bottom, parts.top),
        {n: r for n, r in residuals.items() if ".1." not in n and ".2." not in n},
    )
    fold_residuals(parts.trunk, {n: r for n, r in residuals.items() if ".1." in n or ".2." in n})

    for one, other in zip(parts, plain, strict=True):
        for name in {n.partition(".lora_")[0] for n in trainable_state(one)}:
            layer, before = one.model.get_submodule(name), other.model.get_submodule(name)
            x = torch.randn(5, residuals[f"{name}.residual"].shape[1])
            want = before(x) + x @ residuals[f"{name}.residual"].T
            torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-5)


def test_residuals_add_up_so_that_a_difference_replaces_one() -> None:
    parts, again = tuned("gpt2"), tuned("gpt2")
    first, second = residual_of(parts, 1), residual_of(parts, 2)
    fold_residuals(parts, first)
    fold_residuals(parts, {name: second[name] - first[name] for name in first})
    fold_residuals(again, second)
    torch.testing.assert_close(run(parts, ids()), run(again, ids()), rtol=0, atol=1e-5)


def test_a_residual_and_an_adapter_merge_into_one_weight() -> None:
    model = tiny("gpt2")
    parts = split(model, CUT)
    for part in parts:
        tune(part, "lora", lora=LORA, seed=7)
    with torch.no_grad():
        for part in parts:
            for tensor in trainable_state(part).values():
                tensor.add_(0.1 * torch.randn(tensor.shape))
    fold_residuals(parts, residual_of(parts))
    want = run(parts, ids())
    merge(*parts)
    torch.testing.assert_close(model(ids()).logits, want, rtol=0, atol=1e-5)


def test_bf16_keeps_what_eight_bits_can() -> None:
    parts = split(tiny("llama").bfloat16(), CUT)
    weight = parts.trunk.model.get_submodule("model.layers.1.self_attn.q_proj").weight
    before = weight.detach().float().clone()
    residual = 0.3 * torch.randn(before.shape)

    fold_residuals(parts.trunk, {"model.layers.1.self_attn.q_proj.residual": residual})

    assert weight.dtype == torch.bfloat16
    want = before + residual
    assert ((weight.float() - want).abs() <= want.abs() / 256).all()


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("transformer.h.0.attn.c_attn.residual", (96, 32), "the trunk of this model has no linear"),
        ("transformer.h.1.attn.nothing.residual", (96, 32), "has no linear layer"),
        ("transformer.h.1.ln_1.residual", (32,), "has no linear layer"),
        ("transformer.h.1.attn.c_attn.weight", (96, 32), r"must end in \.residual"),
        ("transformer.h.1.attn.c_attn.residual", (32, 96), r"must be \(96, 32\)"),
        ("transformer.h.1.attn.c_attn.residual", (1, 96, 32), r"must be \(96, 32\)"),
    ],
)
def test_a_wrong_residual_is_refused_and_nothing_changes(
    name: str, shape: tuple[int, ...], words: str
) -> None:
    trunk = tuned("gpt2").trunk
    before = {n: p.detach().clone() for n, p in trunk.named_parameters()}
    good = {"transformer.h.2.attn.c_attn.residual": torch.ones(96, 32)}
    with pytest.raises(ValueError, match=words):
        fold_residuals(trunk, {**good, name: torch.ones(shape)})
    assert all(torch.equal(p, before[n]) for n, p in trunk.named_parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_frozen_lora_a_stays_what_the_seed_made_it(family: str) -> None:
    parts, free = tuned(family, freeze_a=True), tuned(family)
    whole = tune_whole(tiny(family), "lora", lora=LORA, seed=7, freeze_a=True)
    state = {**client_state(parts.bottom, parts.top), **trainable_state(parts.trunk)}
    assert state
    assert all(".lora_B." in name for name in state)
    assert state.keys() == trainable_state(whole).keys()
    for part, other in zip(parts, free, strict=True):
        others = dict(other.named_parameters())
        assert all(torch.equal(p, others[n]) for n, p in part.named_parameters())
    run(parts, ids()).square().mean().backward()
    assert not any(
        p.grad is not None for q in parts for n, p in q.named_parameters() if ".lora_B." not in n
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3"])
def test_a_run_with_frozen_lora_a_leaves_a_whole_adapter(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    saved(base, family)
    parts = tuned(family, freeze_a=True)
    with torch.no_grad():
        for part in parts:
            for tensor in trainable_state(part).values():
                tensor.add_(0.1 * torch.randn(tensor.shape))
    state = {**client_state(parts.bottom, parts.top), **trainable_state(parts.trunk)}

    pairs = complete_pairs(state, outline(str(base)), seed=7)
    folder = save_adapter(tmp_path / "adapter", pairs, str(base), LORA)

    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    got = PeftModel.from_pretrained(plain, str(folder)).eval()(input_ids=ids()).logits
    torch.testing.assert_close(got, run(parts, ids()), rtol=0, atol=1e-5)
    assert complete_pairs(pairs, outline(str(base)), seed=8).keys() == pairs.keys()
