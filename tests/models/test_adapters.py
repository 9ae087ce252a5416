"""LoRA, full and frozen parts, and the one standard folder that three parts are saved in."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.schema import LoraSettings
from models import (
    Cut,
    Parts,
    client_state,
    load_client_state,
    load_trainable_state,
    load_whole,
    merge,
    named_trainable,
    save_adapter,
    save_full,
    split,
    trainable_state,
    tune,
    tune_whole,
)
from models.adapters import block_linears
from models.verify import compare, example
from tests.models.helpers import ids, run, saved, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)
LORA = LoraSettings(rank=3, alpha=6.0)
ALL_LORA = {"bottom": "lora", "trunk": "lora", "top": "lora"}
MASK = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6])
FAMILIES = ["gpt2", "llama", "phi3", "gemma3_text", "opt"]


def tuned(model: PreTrainedModel, modes: dict[str, str], lora: LoraSettings = LORA) -> Parts:
    parts = split(model, CUT)
    for part in parts:
        tune(part, modes[part.role], lora=lora, seed=7)
    return parts


def train(parts: Parts, steps: int = 3) -> None:
    trained = {id(p): p for part in parts for p in named_trainable(part).values()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        run(parts, ids(step), MASK)[MASK.bool()].float().square().mean().backward()
        optimizer.step()


def states(parts: Parts) -> dict[str, Tensor]:
    return {**client_state(parts.bottom, parts.top), **trainable_state(parts.trunk)}


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_and_leaves_the_base_alone(family: str) -> None:
    model = tiny(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parts = tuned(model, ALL_LORA)
    start = {n: t.clone() for n, t in states(parts).items()}
    assert start
    assert all(".lora_" in name for name in start)
    train(parts)
    after = states(parts)
    assert any(not torch.equal(after[n], start[n]) for n in after if ".lora_A." in n)
    assert all(not torch.equal(after[n], start[n]) for n in after if ".lora_B." in n)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "modes",
    [
        ALL_LORA,
        {"bottom": "frozen", "trunk": "lora", "top": "frozen"},
        {"bottom": "full", "trunk": "lora", "top": "frozen"},
        {"bottom": "lora", "trunk": "full", "top": "full"},
    ],
    ids=["lora", "trunk only", "bottom full", "trunk and top full"],
)
def test_split_and_unsplit_start_and_learn_alike(family: str, modes: dict[str, str]) -> None:
    whole = tune_whole(tiny(family), modes, cut=CUT, lora=LORA, seed=7)
    parts = tuned(tiny(family), modes)
    mine, other = states(parts), trainable_state(whole)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    with torch.no_grad():
        for name, parameter in named_trainable(whole).items():
            parameter += 0.01 * torch.randn(parameter.shape)
            mine[name].copy_(parameter)
    whole(ids(), attention_mask=MASK).logits[MASK.bool()].square().mean().backward()
    run(parts, ids(), MASK)[MASK.bool()].square().mean().backward()
    got = {**named_trainable(parts.bottom, parts.top), **named_trainable(parts.trunk)}
    for name, parameter in named_trainable(whole).items():
        torch.testing.assert_close(got[name].grad, parameter.grad, rtol=0, atol=1e-5)


def test_initial_adapters_depend_on_seed_and_name_alone() -> None:
    first = states(tuned(tiny("llama"), ALL_LORA))
    torch.manual_seed(99)
    assert all(torch.equal(t, first[n]) for n, t in states(tuned(tiny("llama"), ALL_LORA)).items())
    trunk = split(tiny("llama"), Cut(0, 1)).trunk
    tune(trunk, "lora", lora=LORA, seed=7)
    other_cut = trainable_state(trunk)
    assert all(torch.equal(t, first[n]) for n, t in other_cut.items())
    tune(trunk := split(tiny("llama"), Cut(0, 1)).trunk, "lora", lora=LORA, seed=8)
    assert all(
        not torch.equal(t, first[n]) for n, t in trainable_state(trunk).items() if "lora_A" in n
    )
    values = [t for n, t in first.items() if "lora_A" in n and t.shape == (3, 32)]
    assert len({tuple(v.flatten().tolist()) for v in values}) == len(values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "modes",
    [ALL_LORA, {"bottom": "frozen", "trunk": "lora", "top": "frozen"}],
    ids=["all", "trunk"],
)
def test_one_peft_folder_gives_the_same_logits(
    family: str, modes: dict[str, str], tmp_path: Path
) -> None:
    model = saved(tmp_path / "base", family)
    parts = tuned(model, modes)
    train(parts)
    folder = save_adapter(tmp_path / "adapter", states(parts), str(tmp_path / "base"), LORA)
    assert sorted(f.name for f in folder.iterdir() if "README" not in f.name) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    peft = PeftModel.from_pretrained(base, str(folder)).eval()
    loaded = {n for n, _ in peft.named_parameters() if "lora_" in n}
    assert {n.removeprefix("base_model.model.") for n in loaded} == set(states(parts))
    got = peft(input_ids=ids(), attention_mask=MASK).logits
    want = run(parts, ids(), MASK)
    torch.testing.assert_close(got[MASK.bool()], want[MASK.bool()], rtol=0, atol=1e-5)
    assert (want - model(ids(), attention_mask=MASK).logits).abs().max() > 1e-3
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(tmp_path / "base"))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family: str) -> None:
    model = tiny(family)
    parts = tuned(model, ALL_LORA)
    train(parts)
    with torch.no_grad():
        want = run(parts, ids(), MASK)
        assert merge(*parts) == sum(len(block_linears(p)) for p in split(tiny(family), CUT))
        torch.testing.assert_close(run(parts, ids(), MASK), want, rtol=0, atol=1e-5)
        whole = model(ids(), attention_mask=MASK).logits  # shares its weights with the parts
        torch.testing.assert_close(whole[MASK.bool()], want[MASK.bool()], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no adapters"):
        merge(model)


def test_state_reloads_bit_equal_and_strictly() -> None:
    parts, fresh = tuned(tiny("llama"), ALL_LORA), tuned(tiny("llama"), ALL_LORA)
    train(parts)
    load_client_state(fresh.bottom, fresh.top, copy.deepcopy(client_state(parts.bottom, parts.top)))
    load_trainable_state(fresh.trunk, trainable_state(parts.trunk))
    assert torch.equal(run(fresh, ids()), run(parts, ids()))
    state = trainable_state(parts.trunk)
    name = next(iter(state))
    before = {n: t.clone() for n, t in state.items()}
    for change, words in (
        ({n: t for n, t in state.items() if n != name}, f"missing {name}"),
        ({**state, "lm_head.weight": torch.zeros(2)}, r"unexpected lm_head\.weight"),
        ({**state, name: state[name][:1]}, "must be"),
    ):
        with pytest.raises(ValueError, match=words):
            load_trainable_state(parts.trunk, {n: t * 2 for n, t in change.items()})
        assert all(torch.equal(t, before[n]) for n, t in trainable_state(parts.trunk).items())


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fully_trained_model_saves_as_one_folder(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    parts = tuned(model, dict.fromkeys(ALL_LORA, "full"))
    train(parts)
    save_full(tmp_path, model.config, states(parts))
    again = load_whole(str(tmp_path), attention="eager").eval()
    assert all(
        torch.equal(p, dict(again.named_parameters())[n]) for n, p in model.named_parameters()
    )
    torch.testing.assert_close(again(ids()).logits, run(parts, ids()), rtol=0, atol=1e-5)
    short = states(parts)
    short.pop(sorted(short)[0])
    with pytest.raises(ValueError, match="missing"):
        save_full(tmp_path / "short", model.config, short)
    with pytest.raises(ValueError, match="unexpected"):
        save_full(tmp_path / "long", model.config, {**states(parts), "extra": torch.zeros(1)})


@pytest.mark.parametrize("bottom", ["full", "lora", "frozen"])
@pytest.mark.parametrize("top", ["full", "lora", "frozen"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_tied_embedding_is_trained_if_bottom_or_top_is_full(
    bottom: str, top: str, order: int
) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    parts = split(model, CUT)
    modes = {"bottom": bottom, "trunk": "frozen", "top": top}
    for part in list(parts)[::order]:
        tune(part, modes[part.role], lora=LORA)
    assert model.lm_head.weight.requires_grad == ("full" in (bottom, top))
    names = [n for n in client_state(parts.bottom, parts.top) if "embed" in n or "lm_head" in n]
    assert names == (["model.embed_tokens.weight"] if "full" in (bottom, top) else [])


def test_frozen_trains_nothing_and_full_everything() -> None:
    model = tiny("llama")
    parts = tuned(model, {"bottom": "frozen", "trunk": "full", "top": "frozen"})
    assert not client_state(parts.bottom, parts.top)
    assert len(trainable_state(parts.trunk)) == len(list(parts.trunk.parameters()))


def test_targets_are_chosen_by_name_and_wrong_ones_refused() -> None:
    trunk = tune(
        split(tiny("gpt2"), CUT).trunk,
        "lora",
        lora=LoraSettings(rank=2, target_modules=("attn.c_proj", "c_fc")),
    )
    layers = {n.partition(".lora_")[0] for n in trainable_state(trunk)}
    assert layers == {f"transformer.h.{i}.{n}" for i in (1, 2) for n in ("attn.c_proj", "mlp.c_fc")}
    for wrong in ("q_proj", "lm_head", "wte"):
        with pytest.raises(ValueError, match=rf"'{wrong}'.*c_attn, c_fc, c_proj"):
            tune(
                split(tiny("gpt2"), CUT).trunk,
                "lora",
                lora=LoraSettings(rank=2, target_modules=(wrong,)),
            )
    with pytest.raises(ValueError, match="unknown tuning"):
        tune(trunk, "some")
    with pytest.raises(ValueError, match="needs the settings"):
        tune(split(tiny("gpt2"), CUT).trunk, "lora")


def test_a_part_without_blocks_has_no_adapters() -> None:
    parts = split(tiny("llama"), Cut(0, 0))
    for part in parts:
        tune(part, "lora", lora=LORA)
    assert not client_state(parts.bottom, parts.top)
    assert len(trainable_state(parts.trunk)) == 2 * 4 * 7


def test_adapters_of_a_bf16_model_are_fp32() -> None:
    parts = tuned(tiny("llama").bfloat16(), ALL_LORA)
    assert {t.dtype for t in states(parts).values()} == {torch.float32}
    h = parts.bottom(ids())
    assert h.dtype == torch.bfloat16
    run(parts, ids()).float().mean().backward()


def test_adapter_dropout_acts_in_training_only() -> None:
    parts = tuned(tiny("llama"), ALL_LORA, LoraSettings(rank=3, dropout=0.5))
    train(parts)
    for part in parts:
        part.train()
    assert not torch.equal(run(parts, ids()), run(parts, ids()))
    for part in parts:
        part.eval()
    assert torch.equal(run(parts, ids()), run(parts, ids()))


def test_saving_refuses_what_is_not_an_adapter(tmp_path: Path) -> None:
    parts = tuned(tiny("llama"), {"bottom": "full", "trunk": "lora", "top": "lora"})
    with pytest.raises(ValueError, match="not a LoRA tensor"):
        save_adapter(tmp_path, states(parts), "base", LORA)
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(tmp_path, {}, "base", LORA)
    half = {n: t for n, t in trainable_state(parts.trunk).items() if "lora_B" not in n}
    with pytest.raises(ValueError, match="incomplete"):
        save_adapter(tmp_path, half, "base", LORA)
    with pytest.raises(ValueError, match="rank"):
        save_adapter(tmp_path, trainable_state(parts.trunk), "base", LoraSettings(rank=5))


def test_a_model_with_adapters_splits_exactly() -> None:
    whole = tune_whole(tiny("llama"), "lora", lora=LORA, seed=3)
    with torch.no_grad():
        for parameter in named_trainable(whole).values():
            parameter += 0.05 * torch.randn(parameter.shape)
    for padding in ("none", "left"):
        assert compare(whole, split(whole, CUT), *example(whole.config, padding)).within(1e-5)
