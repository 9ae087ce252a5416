"""A trunk narrowed to a client's cut is the trunk that a split at that cut would give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from conf.schema import LoraSettings
from models import Cut, Part, narrow, split, trainable_state, tune, tune_whole
from tests.models.helpers import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
MASK = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6])
LORA = LoraSettings(rank=3, alpha=6.0)
CUTS = [Cut(1, 1), Cut(2, 0), Cut(0, 3), Cut(2, 1), Cut(3, 0)]


def activations() -> Tensor:
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5))


def through(trunk: Part, mask: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, gradient of the input, gradients of the parameters by name."""
    h = activations().requires_grad_()
    out = trunk(h, mask)
    trunk.zero_grad(set_to_none=True)
    out.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in trunk.named_parameters() if p.grad is not None}
    trunk.zero_grad(set_to_none=True)
    assert h.grad is not None
    return out.detach(), h.grad, gradients


def assert_alike(one: Part, other: Part) -> None:
    for mask in (None, MASK):
        (out, grad, own), (out_, grad_, own_) = through(one, mask), through(other, mask)
        assert torch.equal(out, out_)
        assert torch.equal(grad, grad_)
        assert own.keys() == own_.keys()
        assert own
        assert all(torch.equal(own[name], own_[name]) for name in own)


@pytest.mark.parametrize("family", sorted({family for family, _ in FAMILIES}))
def test_narrowed_equals_split_there(family: str) -> None:
    """Bitwise: families with windows, per-layer types and Conv1D among them."""
    model = tiny(family)
    trunk = split(model, Cut(0, 0)).trunk
    for cut in CUTS:
        assert_alike(narrow(trunk, cut), split(model, cut).trunk)
    inner = split(model, Cut(1, 0)).trunk
    assert_alike(narrow(narrow(inner, Cut(2, 0)), Cut(2, 1)), split(model, Cut(2, 1)).trunk)
    assert_alike(narrow(inner, Cut(1, 2)), split(model, Cut(1, 2)).trunk)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "qwen2", "phi3"])
def test_narrowed_with_adapters_equals_split_there(family: str) -> None:
    whole = tune_whole(tiny(family), "lora", lora=LORA, seed=7)
    trunk = tune(split(tiny(family), Cut(0, 1)).trunk, "lora", lora=LORA, seed=7)
    with torch.no_grad():
        values = dict(whole.named_parameters())
        for name, tensor in trainable_state(trunk).items():
            tensor.add_(0.1 * torch.randn(tensor.shape))
            values[name].copy_(tensor)
    for cut in (Cut(1, 1), Cut(0, 2), Cut(2, 1)):
        assert_alike(narrow(trunk, cut), split(whole, cut).trunk)


def test_nothing_is_copied_and_the_trunk_stays_as_it_was() -> None:
    trunk = tune(split(tiny("gemma3_text"), Cut(0, 1)).trunk, "lora", lora=LORA, seed=7)
    before, names = trunk(activations()).detach(), [n for n, _ in trunk.named_modules()]
    own = dict(trunk.named_parameters())

    view = narrow(trunk, Cut(1, 2))

    assert all(parameter is own[name] for name, parameter in view.named_parameters())
    buffers = dict(trunk.named_buffers())
    assert all(buffer is buffers[name] for name, buffer in view.named_buffers())
    assert {n.split(".")[3] for n, _ in view.named_parameters()} == {"1"}
    assert (view.cut, view.blocks, view.role) == (Cut(1, 2), range(1, 2), "trunk")
    assert (trunk.cut, trunk.blocks) == (Cut(0, 1), range(3))
    assert [n for n, _ in trunk.named_modules()] == names
    assert torch.equal(trunk(activations()), before)
    assert narrow(trunk, Cut(0, 1)) is trunk
    with torch.no_grad():
        for name, parameter in view.named_parameters():
            if "lora_B" in name:
                parameter += 1.0
    assert not torch.equal(trunk(activations()), before)


def test_activations_enter_at_one_place() -> None:
    view = narrow(split(tiny("llama"), Cut(1, 0)).trunk, Cut(2, 1))
    modes = [getattr(block, "graft_mode", "own") for block in view.model.model.layers]
    assert modes == ["idle", "deliver", "own", "idle"]


def test_a_deep_copy_of_a_narrowed_trunk_stands_alone() -> None:
    trunk = split(tiny("llama"), Cut(0, 1)).trunk
    twin = copy.deepcopy(narrow(trunk, Cut(1, 1)))
    assert_alike(twin, split(tiny("llama"), Cut(1, 1)).trunk)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_narrowed_trunk_is_in_the_trunks_mode(mode: str) -> None:
    trunk = split(tiny("gpt2", resid_pdrop=0.5), Cut(0, 1)).trunk
    view = narrow(getattr(trunk, mode)(), Cut(1, 1))
    assert all(module.training == (mode == "train") for module in view.modules())
    assert torch.equal(view(activations()), view(activations())) == (mode == "eval")


def test_what_cannot_be_narrowed_is_refused_in_words() -> None:
    bottom, trunk, _ = split(tiny("llama"), Cut(1, 1))
    for cut in (Cut(0, 1), Cut(1, 0)):
        with pytest.raises(ValueError, match="keep at least 1 below and 1 above"):
            narrow(trunk, cut)
    with pytest.raises(ValueError, match="leaves no trunk"):
        narrow(trunk, Cut(2, 2))
    with pytest.raises(ValueError, match="only a trunk"):
        narrow(bottom, Cut(1, 1))
