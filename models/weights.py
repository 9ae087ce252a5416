"""LoRA on weights that are no layers of their own: stacked experts, and routers that return tuples.

The mathematics is that of PEFT's `target_parameters`: ``W + s * B @ A`` for each expert. PEFT puts
the sum into the module itself while it runs, which sessions that share a module (every evaluation
at the trunk) may not do; and its factors do not tell the rank. Here the sum goes into a copy of the
module that lives for one forward, and the rank is A's first and B's second dimension.

Shapes: E experts (absent for a plain matrix), I inputs, O outputs, r rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ADAPTER = "default"


class WeightLora(nn.Module):
    """A module of which some weights have adapters.

    Parameters
    ----------
    base_layer : nn.Module
    names : sequence of str
        Of its parameters, (E, O, I) or (O, I); (E, I, O) if it is called `is_transposed`.
    rank : int
    alpha : float
        The product is added times ``alpha / rank``.
    """

    def __init__(self, base_layer: nn.Module, names: list[str], rank: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapted = tuple(names)
        self.scale = alpha / rank
        for name in names:
            self.add_module(
                name, _Factors(base_layer.get_parameter(name), rank, is_flipped(base_layer))
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base layer with its weights and what is added to them."""
        view = copy.copy(self.base_layer)
        view._parameters = {**view._parameters, **{n: self.weight_of(n) for n in self.adapted}}
        return view(*args, **kwargs)

    def weight_of(self, name: str) -> Tensor:
        """Return a weight with what is added to it, in its own type and layout."""
        weight = self.base_layer.get_parameter(name)
        factors = self.get_submodule(name)
        B, A = factors.lora_B[ADAPTER].weight, factors.lora_A[ADAPTER].weight
        B_EOr, A_ErI = leading_experts(B.to(weight.dtype), A.to(weight.dtype))
        if is_flipped(self.base_layer):
            B_EOr, A_ErI = A_ErI.mT, B_EOr.mT
        add = torch.addmm if weight.dim() == 2 else torch.baddbmm
        return add(weight, B_EOr, A_ErI, alpha=self.scale)

    def merge(self) -> None:
        """Add the products to the base weights, for good."""
        for name in self.adapted:
            merged = self.weight_of(name).detach()
            if not torch.isfinite(merged).all():
                raise ValueError(f"{name} is not finite with its adapter merged; it is damaged")
            with torch.no_grad():
                self.base_layer.get_parameter(name).copy_(merged)


class _Factors(nn.Module):
    def __init__(self, weight: nn.Parameter, rank: int, flipped: bool) -> None:
        super().__init__()
        shape_A, shape_B = factor_shapes(weight, rank, flipped)
        self.lora_A = nn.ModuleDict({ADAPTER: _Factor(shape_A, weight.device)})
        self.lora_B = nn.ModuleDict({ADAPTER: _Factor(shape_B, weight.device)})


class _Factor(nn.Module):
    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, device=device))


def is_flipped(module: nn.Module) -> bool:
    """Whether a module holds its weights as (inputs, outputs)."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def factor_shapes(
    weight: Tensor, rank: int, flipped: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A, (r, E, I) or (r, I), and of B, (O, r, E) or (O, r)."""
    *experts, outputs, inputs = weight.mT.shape if flipped else weight.shape
    return (rank, *experts, inputs), (outputs, rank, *experts)


def leading_experts(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """View (O, r, E) and (r, E, I) as (E, O, r) and (E, r, I); matrices stay as they are."""
    return (B, A) if A.dim() == 2 else (B.permute(2, 0, 1), A.transpose(0, 1))
