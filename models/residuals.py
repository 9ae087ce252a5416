"""What the mean of adapters holds beyond their rank, folded into the weights that they adapt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models.parts import Part
from models.weights import WeightLora, is_flipped

RESIDUAL = ".residual"
"""Ends the name of what is added to the base weight of an adapted module."""


def fold_residuals(parts: Part | Iterable[Part], residuals: Mapping[str, Tensor]) -> None:
    """Add to base weights what the mean of adapters holds beyond their rank, in place.

    Parameters
    ----------
    parts : Part or iterable of Part
        Any parts of one model; each weight is in one of them.
    residuals : mapping
        ``"<weight>.residual"``, weights named as in the whole model, a layer's by the layer, to a
        dense (out, in) tensor, or (experts, out, in).
        Every call adds: to go from one residual to another, give their difference.

    Raises
    ------
    ValueError
        If a name is not of a weight of these parts that can be adapted, or a shape differs; nothing
        is added then.

    Notes
    -----
    The sum is made in fp32 and rounded to the weight's own type. In bf16 that keeps 8 bits: what is
    below a 1/512 of a weight is lost, each time anew where differences are added.
    """
    own = [parts] if isinstance(parts, Part) else list(parts)
    sums = [
        (weight, delta)
        for name, residual in residuals.items()
        for weight, delta in [_addends(own, name, residual)]
    ]
    with torch.no_grad():
        for weight, delta in sums:
            weight.copy_(weight.float() + delta.to(weight.device, torch.float32))


def residual_weights(part: Part, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the base weight that each residual of these names is added to."""
    return {name: _base_weight([part], name)[0] for name in sorted(names)}


def base_weight(model: nn.Module, name: str) -> tuple[nn.Parameter, bool] | None:
    """Find what an adapter of this name adapts, and whether it is held as (inputs, outputs).

    Parameters
    ----------
    model : PreTrainedModel
        With or without adapters.
    name : str
        Of a linear layer, or of a parameter that is adapted as such.

    Returns
    -------
    tuple or None
        None: `model` holds nothing of this name that can be adapted.
    """
    owner, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    layer, around = modules.get(name), modules.get(owner)
    if isinstance(layer, LoraLayer):
        layer = layer.get_base_layer()
    if isinstance(layer, (nn.Linear, Conv1D)):
        return layer.weight, is_flipped(layer)
    if isinstance(around, WeightLora):
        around = around.base_layer
    weight = around._parameters.get(leaf) if around is not None else None
    return None if around is None or weight is None else (weight, is_flipped(around))


def _addends(parts: list[Part], name: str, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The base weight that a residual is for, and the residual as that weight is laid out."""
    weight, flip = _base_weight(parts, name)
    want = tuple(weight.mT.shape if flip else weight.shape)
    if tuple(residual.shape) != want or not residual.is_floating_point():
        raise ValueError(f"{name} is {residual.dtype} {tuple(residual.shape)}, must be {want}")
    return weight, residual.mT if flip else residual


def _base_weight(parts: list[Part], name: str) -> tuple[nn.Parameter, bool]:
    module, mark, rest = name.rpartition(RESIDUAL)
    if not mark or rest:
        raise ValueError(f"{name} is not a residual; its name must end in {RESIDUAL}")
    for part in parts:
        if (found := base_weight(part.model, module)) is not None and found[0].dim() > 1:
            return found
    roles = " and ".join(part.role for part in parts)
    raise ValueError(f"{name}: the {roles} of this model has no linear layer {module}")
