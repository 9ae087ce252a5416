"""Who owns what, and that parts, copies and threads do not meet."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from conf.schema import LoraSettings
from models import Cut, split, tune
from models.parts import Part
from tests.models.helpers import FAMILIES, ids, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", sorted({family for family, _ in FAMILIES}))
@pytest.mark.parametrize("cut", [Cut(1, 1), Cut(0, 0)], ids=str)
def test_each_part_owns_its_tensors_alone(family: str, cut: Cut) -> None:
    model = tiny(family)
    parts = split(model, cut)
    whole = {id(p): n for n, p in model.named_parameters()}
    owned = [{whole[id(p)] for p in part.parameters()} for part in parts]
    assert set().union(*owned) == set(whole.values())
    embedding = whole[id(model.get_input_embeddings().weight)]
    bottom, trunk, top = owned
    assert not trunk & (bottom | top)
    shared = {embedding} if model.config.tie_word_embeddings else set()
    assert bottom & top == shared
    stack = parts.trunk.block_list
    assert all(name.startswith(stack + ".") for name in trunk)
    assert not any(isinstance(m, nn.Embedding) and m.weight.numel() for m in parts.trunk.modules())


def test_parts_unpack_and_describe_themselves() -> None:
    parts = split(tiny("llama"), Cut(2, 1))
    bottom, trunk, top = parts
    assert (bottom.role, trunk.role, top.role) == ("bottom", "trunk", "top")
    assert (trunk.blocks, trunk.num_blocks_total, trunk.hidden_size) == (range(2, 3), 4, 32)
    assert trunk.cut == Cut(2, 1)
    assert trunk.config.model_type == "llama"
    assert "blocks=2..2" in repr(trunk)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("gpt2")
    before, names = model(ids()).logits, [n for n, _ in model.named_modules()]
    parts = split(model, Cut(1, 1))
    for part in parts:
        tune(part, "lora", lora=LoraSettings(rank=2))
    run(parts, ids())
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(model(ids()).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def replica(part: Part) -> Part:
    return copy.deepcopy(part, {id(p): p for p in part.parameters() if not p.requires_grad})


def test_a_deep_copy_shares_frozen_weights_and_copies_trained_ones() -> None:
    trunk = split(tiny("llama"), Cut(0, 1)).trunk
    tune(trunk, "lora", lora=LoraSettings(rank=2), seed=1)
    twin = replica(trunk)
    for (name, own), other in zip(trunk.named_parameters(), twin.parameters(), strict=True):
        assert (own is other) == ("lora_" not in name)
    h = torch.randn(2, 5, 32)
    before = trunk(h)
    assert torch.equal(twin(h), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    assert not torch.equal(twin(h), before)
    assert torch.equal(trunk(h), before)


@pytest.mark.parametrize("same", [True, False], ids=["one part", "two copies"])
@pytest.mark.parametrize("bottom", [0, 1])
def test_two_threads_do_not_disturb_one_another(same: bool, bottom: int) -> None:
    trunk = split(tiny("gemma3_text"), Cut(bottom, 1)).trunk
    trunks = [trunk, trunk if same else replica(trunk)]
    inputs = [torch.randn(2, 7 + i, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    expected = [trunk(h).detach() for h in inputs]
    wrong: list[str] = []
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        for step in range(30):
            barrier.wait()
            if not torch.equal(trunks[i](inputs[i]), expected[i]):
                wrong.append(f"thread {i}, step {step}")

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("bottom", [0, 1])
def test_the_trunk_gives_the_gradient_of_what_it_received(bottom: int) -> None:
    trunk = split(tiny("gpt2"), Cut(bottom, 1)).trunk  # it computes in double throughout
    h = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    trunk.double()
    assert torch.autograd.gradcheck(lambda x: trunk(x), (h,), atol=1e-6)


def test_wrong_input_is_refused_in_words() -> None:
    bottom, trunk, top = split(tiny("llama"), Cut(1, 1))
    with pytest.raises(ValueError, match="token ids"):
        bottom(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"activations \(B, T, 32\)"):
        trunk(torch.zeros(2, 3, 31))
    with pytest.raises(ValueError, match="activations"):
        top(ids())
    with pytest.raises(ValueError, match="attention_mask"):
        trunk(torch.zeros(2, 3, 32), torch.ones(2, 4))


def test_an_error_inside_leaves_the_part_usable() -> None:
    bottom = split(tiny("llama"), Cut(1, 1)).bottom
    expected = bottom(ids())
    with pytest.raises(IndexError):
        bottom(torch.full((1, 3), 10_000))
    assert torch.equal(bottom(ids()), expected)
