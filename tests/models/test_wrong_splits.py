"""The comparison must fail on the mistakes that made earlier attempts plausible and wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import Cut, split
from models.flow import Skip
from models.verify import check_forward
from tests.models.helpers import differences, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


class _Identity(torch.autograd.Function):
    """Forward through the trunk under no_grad; backward hands on the gradient it was sent."""

    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor, trunk: Any, mask_BT: Tensor | None) -> Tensor:
        with torch.no_grad():
            return trunk(h_BTD, mask_BT)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None]:
        return grad_BTD, None, None


def test_an_identity_backward_is_caught() -> None:
    model = tiny("llama")
    bottom, trunk, top = split(model, Cut(1, 1))

    def wrong(h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return _Identity.apply(h_BTD, trunk, mask_BT)

    for gap in differences(model, [bottom, wrong, top]):
        assert gap.logits == 0, "the forward is right, only the backward is not"
        assert gap.gradient == float("inf"), "the trunk's weights got no gradient"


def test_a_wrong_gradient_below_the_trunk_is_caught_though_all_names_are_there() -> None:
    model = tiny("llama")
    bottom, trunk, top = split(model, Cut(1, 1))

    def wrong(h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return trunk(h_BTD * 1.5 - (h_BTD * 0.5).detach(), mask_BT)

    assert not any(gap.within() for gap in differences(model, [bottom, wrong, top]))


def test_a_detached_cut_is_caught() -> None:
    model = tiny("llama")
    bottom, trunk, top = split(model, Cut(1, 1))
    gaps = differences(model, [bottom, lambda h, m: trunk(h.detach(), m), top])
    assert all(gap.gradient == float("inf") for gap in gaps)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt"])
@pytest.mark.parametrize("role", [0, 1, 2])
def test_a_dropped_mask_is_caught(family: str, role: int) -> None:
    model = tiny(family)
    parts: list[Any] = list(split(model, Cut(1, 1)))
    deaf = parts[role]
    parts[role] = lambda x, mask_BT: deaf(x, None)
    unpadded, left, _ = differences(model, parts)
    assert unpadded.within(1e-5)
    assert not left.within(1e-5)


def test_layer_types_off_by_one_are_caught() -> None:
    model = tiny("gemma3_text")
    parts = split(model, Cut(1, 1))
    config = parts.trunk.config
    config.layer_types = config.layer_types[1:] + config.layer_types[:1]
    assert not any(gap.within() for gap in differences(model, parts))


def test_a_block_too_few_is_caught() -> None:
    model = tiny("llama")
    _, trunk, top = split(model, Cut(2, 1))
    gaps = differences(model, [split(model, Cut(1, 1)).bottom, trunk, top])
    assert all(not gap.within() for gap in gaps)
    with pytest.raises(ValueError, match="not exact"):
        check_forward(
            model, type(split(model, Cut(2, 1)))(split(model, Cut(1, 1)).bottom, trunk, top)
        )


def test_what_comes_from_a_stand_in_is_never_a_number() -> None:
    """Without the activations it was sent, a part answers NaN, not something plausible."""
    model = tiny("llama")
    trunk = split(model, Cut(2, 1)).trunk
    for module in trunk.modules():
        if isinstance(module, Skip):
            module.graft_mode = "idle"
    assert torch.isnan(trunk(torch.zeros(1, 4, 32))).all()
