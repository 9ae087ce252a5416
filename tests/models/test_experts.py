"""Adapters by default on every kind of block: experts, routers, state-space layers, plain ones."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from conf.schema import LoraSettings
from models import (
    Cut,
    Part,
    Parts,
    adapted_shares,
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
from models.cut import ROLES
from models.residuals import base_weight
from tests.models.helpers import ids, run, saved, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)
LORA = LoraSettings(rank=2, alpha=6.0)
MASK = torch.tensor([[1] * 9, [1] * 6 + [0, 0, 0]])
# Shared experts beside fused ones; fused ones alone, (out, in) and (in, out); a router that returns
# a tuple; layers that take no adapter; families without anything odd.
FAMILIES = ["glm4_moe", "qwen3_moe", "gpt_oss", "llama4_text", "mamba", "gpt2", "llama"]
MIXTURES = FAMILIES[:4]


def tuned(family: str, lora: LoraSettings = LORA, folder: Path | None = None, **how: bool) -> Parts:
    model = tiny(family) if folder is None else saved(folder, family)
    parts = split(model, CUT)
    for part in parts:
        tune(part, "lora", lora=lora, seed=7, **how)
    return parts


def states(parts: Parts) -> dict[str, Tensor]:
    return {**client_state(parts.bottom, parts.top), **trainable_state(parts.trunk)}


def disturb(state: dict[str, Tensor]) -> None:
    """Give all adapters something to add."""
    for number, name in enumerate(sorted(state)):
        generator = torch.Generator().manual_seed(number)
        state[name] += 0.1 * torch.randn(state[name].shape, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_can_be_adapted_is_at_the_rank_asked_for(family: str) -> None:
    parts = tuned(family)

    run(parts, ids(), MASK)[MASK.bool()].square().mean().backward()
    disturb(states(parts))
    run(parts, ids(), MASK)[MASK.bool()].square().mean().backward()

    adapters = {n: p for part in parts for n, p in part.named_parameters() if ".lora_" in n}
    assert {p.shape[0] for n, p in adapters.items() if ".lora_A." in n} == {2}
    assert {p.shape[1] for n, p in adapters.items() if ".lora_B." in n} == {2}
    assert all(p.grad is not None and p.grad.any() for p in adapters.values())
    for part in parts:
        names = {n.partition(".lora_")[0] for n in trainable_state(part)}
        assert names == set(block_linears(part))
        layers = {
            n.removesuffix(".base_layer")
            for n, m in part.model.named_modules()
            if isinstance(m, torch.nn.Linear) and ".lora_" not in n and part.block_list in n
        }
        left_out = {n for n in part.inventory.left_out if n in layers}
        assert {n.removesuffix(".weight") for n in names} >= layers - left_out
        assert not names & left_out


def test_what_cannot_be_adapted_is_left_out() -> None:
    left_out = {name.rpartition(".")[2] for name in tuned("mamba").trunk.inventory.left_out}
    assert left_out == {"out_proj", "dt_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_in_the_split_equal_those_of_peft_on_the_model(
    family: str, tmp_path: Path
) -> None:
    parts = tuned(family, folder=tmp_path / "base")
    state = states(parts)
    disturb(state)

    save_adapter(tmp_path / "adapter", state, str(tmp_path / "base"), LORA)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).eval()
    got, want = run(parts, ids(), MASK), peft(input_ids=ids(), attention_mask=MASK).logits
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=0, atol=1e-5)
    for logits in (got, want):
        logits[MASK.bool()].square().mean().backward()
    own = {n: p for part in parts for n, p in part.named_parameters() if p.requires_grad}
    gradients = {n.removeprefix("model."): p.grad for n, p in own.items()}
    theirs = [p for p in peft.parameters() if p.requires_grad]
    assert len(theirs) == len(gradients)
    for gradient in gradients.values():
        assert gradient is not None
        # PEFT holds the factors of all experts as one matrix, their ranks in another order.
        numbers = gradient.flatten().sort().values
        gaps = [
            (numbers - p.grad.flatten().sort().values).abs().max()
            for p in theirs
            if p.grad is not None and p.numel() == gradient.numel()
        ]
        assert min(gaps) <= 1e-5


def test_what_peft_would_rename_on_loading_is_called_as_in_a_checkpoint(tmp_path: Path) -> None:
    """PEFT applies a family's renamings to adapters; laguna's catches names that are right."""
    parts = tuned("laguna", folder=tmp_path / "base")
    state = states(parts)
    disturb(state)

    save_adapter(tmp_path / "adapter", state, str(tmp_path / "base"), LORA)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    peft = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    got, want = peft(input_ids=ids()).logits, run(parts, ids())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_split_and_unsplit_start_and_learn_alike(family: str) -> None:
    whole = tune_whole(tiny(family), "lora", cut=CUT, lora=LORA, seed=7)
    parts = tuned(family)
    mine, other = states(parts), trainable_state(whole)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    disturb(mine)
    disturb(other)

    whole(ids(), attention_mask=MASK).logits[MASK.bool()].square().mean().backward()
    run(parts, ids(), MASK)[MASK.bool()].square().mean().backward()

    got = {n: p.grad for part in parts for n, p in part.model.named_parameters() if ".lora_" in n}
    want = {n: p.grad for n, p in whole.named_parameters() if ".lora_" in n}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_train_and_merge_and_leave_the_base_alone(family: str) -> None:
    parts = tuned(family)
    base = {n: p.detach().clone() for p in parts for n, p in p.named_parameters()}
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        run(parts, ids(step), MASK)[MASK.bool()].square().mean().backward()
        optimizer.step()
    frozen = {n: p for part in parts for n, p in part.named_parameters() if ".lora_" not in n}
    assert all(torch.equal(p, base[n]) for n, p in frozen.items())

    want = run(parts, ids(), MASK).detach()
    count = sum(len(block_linears(part)) for part in parts)

    assert merge(*parts) == count
    got = run(parts, ids(), MASK)
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=0, atol=1e-5)
    assert not [n for part in parts for n, _ in part.named_parameters() if "lora" in n]


@pytest.mark.parametrize("family", MIXTURES)
def test_a_residual_of_experts_adds_to_their_weights(family: str) -> None:
    """As much as adapters of full rank would: here, what the adapters themselves add."""
    parts, plain = tuned(family), tuned(family)
    state = states(parts)
    disturb(state)
    residuals = {}
    for name in {n.partition(".lora_")[0] for n in state}:
        A, B = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
        product = torch.einsum("or...,r...i->...oi", B, A)
        residuals[f"{name}.residual"] = product * LORA.alpha / LORA.rank

    fold_residuals(plain, residuals)

    got, want = run(plain, ids(), MASK), run(parts, ids(), MASK)
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=0, atol=1e-5)
    name = next(n for n in sorted(residuals) if "experts." in n and "shared" not in n)
    with pytest.raises(ValueError, match="must be"):
        fold_residuals(plain, {name: residuals[name].mT})


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss"])
def test_a_frozen_lora_a_of_experts_is_made_again_from_the_seed(
    family: str, tmp_path: Path
) -> None:
    parts, full = tuned(family, folder=tmp_path, freeze_a=True), tuned(family)
    assert not any(".lora_A." in name for name in states(parts))

    pairs = complete_pairs(states(parts), outline(str(tmp_path)), seed=7)

    want = states(full)
    assert pairs.keys() == want.keys()
    assert all(torch.equal(pairs[n], want[n]) for n in want if ".lora_A." in n)


def test_sessions_may_run_one_module_at_a_time_of_their_own() -> None:
    """Evaluations share the trunk; PEFT's wrapper changes the module while it runs."""
    parts = tuned("qwen3_moe")
    disturb(states(parts))
    with torch.no_grad():
        h_BTD = parts.bottom(ids())
        want = parts.trunk(h_BTD)
    wrong: list[object] = []

    def work() -> None:
        try:
            with torch.no_grad():
                wrong.extend(1 for _ in range(8) if not torch.equal(parts.trunk(h_BTD), want))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_the_weights(family: str) -> None:
    parts = tuned(family)

    told = adapted_shares(parts.trunk, dict.fromkeys(ROLES, "lora"), LORA)

    assert told == pytest.approx({part.role: share_of(part) for part in parts})
    assert 0 < told["trunk"] < 1
    assert adapted_shares(
        parts.top, {"bottom": "full", "trunk": "lora", "top": "frozen"}, LORA
    ) == {"trunk": told["trunk"]}


def share_of(part: Part) -> float:
    """By the weights themselves."""
    names = {n.partition(".lora_")[0] for n in trainable_state(part)}
    found = [base_weight(part.model, name) for name in names]
    adapted = sum(pair[0].numel() for pair in found if pair is not None)
    base = {id(p): p.numel() for n, p in part.named_parameters() if ".lora_" not in n}
    return adapted / sum(base.values())


def test_experts_can_be_named_and_left_alone() -> None:
    names = ("q_proj", "experts.down_proj", "layers.1.mlp.experts.gate_up_proj")
    parts = tuned("qwen3_moe", LoraSettings(rank=2, target_modules=names))
    adapted = {n.partition(".lora_")[0] for n in states(parts)}
    assert adapted == {
        "model.layers.1.mlp.experts.gate_up_proj",
        *(f"model.layers.{i}.mlp.experts.down_proj" for i in range(4)),
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(4)),
    }


def test_a_name_that_only_other_parts_have_is_no_mistake() -> None:
    parts = tuned("glm4_moe", LoraSettings(rank=2, target_modules=("shared_experts.up_proj",)))
    assert not trainable_state(parts.bottom)  # its only block is dense
    assert trainable_state(parts.trunk)
    assert trainable_state(parts.top)


@pytest.mark.parametrize(
    ("family", "name", "words"),
    [
        ("qwen3_moe", "gate_proj", r"'gate_proj' is no linear layer .* down_proj, gate_up_proj"),
        ("mamba", "out_proj", r"'out_proj' cannot be adapted, PEFT refuses it.*; take it out"),
        ("mamba", "conv1d", r"'conv1d' is no linear layer of these blocks; they have in_proj"),
        ("jamba", "dt_proj", r"'dt_proj' cannot be adapted, its weight is read past the layer"),
        ("whisper", "encoder_attn.q_proj", r"cannot be adapted, it attends to an encoder"),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_the_remedy(
    family: str, name: str, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"lora\.target_modules: .*{words}"):
        tuned(family, LoraSettings(rank=2, target_modules=(name,)))


def test_dropout_beside_experts_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"lora\.dropout=0\.1 cannot act .*experts.*k_proj"
    ) as told:
        tuned("glm4_moe", LoraSettings(rank=2, dropout=0.1))
    names = tuple(str(told.value).rpartition("none but ")[2].split(", "))
    lora = LoraSettings(rank=2, dropout=0.1, target_modules=names)

    parts = tuned("glm4_moe", lora, tmp_path / "base")

    layers = {n for part in parts for n in block_linears(part) if ".experts." not in n}
    assert {n.partition(".lora_")[0] for n in states(parts)} == layers
    save_adapter(tmp_path / "adapter", states(parts), str(tmp_path / "base"), lora)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
