"""What is trained in a part: everything, LoRA adapters, or nothing.

LoRA (Hu et al. 2021, arXiv:2106.09685) is peft's. Its initial values are a function of the seed
and the tensor's name in the whole model, so that a split model, the unsplit one and every client
start alike whatever they build first.

Under FFA-LoRA (Sun et al. 2024, arXiv:2403.12313) lora_A keeps these values, so that the mean of
lora_B is the mean of the products.

A tied embedding is one Parameter in bottom and top: it is trained if either of them is ``full``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.cut import ROLES, Cut
from models.parts import Part, split_unchecked
from models.state import global_name

MODES = ("full", "lora", "frozen")
ADAPTER = "default"
RESIDUAL = ".residual"
"""Ends the name of what is added to the base weight of an adapted module."""
_WANTED_BY = "_graft_wanted_by"


class Lora(Protocol):
    """Settings of the adapters; `conf.schema.LoraSettings` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def target_modules(self) -> tuple[str, ...]: ...


def tune(
    part: Part, mode: str, *, lora: Lora | None = None, seed: int = 0, freeze_a: bool = False
) -> Part:
    """Choose what is trained in a part.

    Parameters
    ----------
    part : Part
        Changed in place.
    mode : str
        ``full``: every weight. ``lora``: adapters on the linear layers of its blocks, in fp32; a
        part without blocks gets none. ``frozen``: nothing.
    lora : Lora, optional
        Needed by ``lora``. Empty `target_modules`: all linear layers of the blocks.
    seed : int
        Of the adapters' initial values.
    freeze_a : bool
        Train lora_B only (FFA-LoRA).

    Returns
    -------
    Part
        The same part.

    Raises
    ------
    ValueError
        If the mode is unknown, `lora` is absent, or a target module is in none of the blocks.
    """
    _check_mode(mode)
    _want(part.parameters(), part.role, mode == "full")
    if mode == "lora" and len(part.blocks):
        lora = _needed(lora)
        _inject(part.model, _choose(block_linears(part), lora), lora, seed, freeze_a)
    return part


def tune_whole(
    model: PreTrainedModel,
    modes: str | Mapping[str, str],
    *,
    cut: Cut | None = None,
    lora: Lora | None = None,
    seed: int = 0,
    freeze_a: bool = False,
) -> PreTrainedModel:
    """Choose what is trained in an unsplit model, exactly as `tune` does in its parts.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place.
    modes : str or mapping
        One mode for all, or one for each role, which needs `cut`.
    cut : Cut, optional
    lora, seed, freeze_a
        As in `tune`.
    """
    if isinstance(modes, str):
        modes, cut = dict.fromkeys(ROLES, modes), cut or Cut(0, 0)
    if cut is None or set(modes) != set(ROLES):
        raise ValueError(f"give a cut and a mode for each of {', '.join(ROLES)}")
    linears: list[str] = []
    for part in split_unchecked(model, cut):
        mode = modes[part.role]
        _check_mode(mode)
        _want(part.parameters(), part.role, mode == "full")
        if mode == "lora" and len(part.blocks):
            chosen = _choose(block_linears(part), _needed(lora))
            linears += chosen
    if linears:
        _inject(model, linears, _needed(lora), seed, freeze_a)
    return model


def merge(*modules: nn.Module) -> int:
    """Add adapters to the weights they adapt and remove them, in place.

    Parameters
    ----------
    *modules : Part or PreTrainedModel
        A part of a split model changes the weights that it shares with the whole model.

    Returns
    -------
    int
        Adapted layers; parts may have none.

    Raises
    ------
    ValueError
        If a whole model has none: parts of a split model have their adapters to themselves, so
        merging the whole would do nothing.
    """
    count = 0
    for module in modules:
        for name, layer in list(module.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
                parent, _, leaf = name.rpartition(".")
                module.get_submodule(parent)._modules[leaf] = layer.get_base_layer()
                count += 1
    if not count and not all(isinstance(module, Part) for module in modules):
        raise ValueError("there are no adapters to merge; merge the parts that were tuned")
    return count


def fold_residuals(parts: Part | Iterable[Part], residuals: Mapping[str, Tensor]) -> None:
    """Add to base weights what the mean of adapters holds beyond their rank, in place.

    Parameters
    ----------
    parts : Part or iterable of Part
        Any parts of one model; each module is in one of them.
    residuals : mapping
        ``"<module>.residual"``, modules named as in the whole model, to a dense (out, in) tensor.
        Every call adds: to go from one residual to another, give their difference.

    Raises
    ------
    ValueError
        If a name is not of a linear layer of these parts, or a shape differs; nothing is added
        then.

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
    return {name: _base_layer([part], name).weight for name in sorted(names)}


def _addends(parts: list[Part], name: str, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The base weight that a residual is for, and the residual as that weight is laid out."""
    base = _base_layer(parts, name)
    flip = isinstance(base, Conv1D)
    want = tuple(base.weight.shape)[:: -1 if flip else 1]
    if tuple(residual.shape) != want or not residual.is_floating_point():
        raise ValueError(f"{name} is {residual.dtype} {tuple(residual.shape)}, must be {want}")
    return base.weight, residual.T if flip else residual


def _base_layer(parts: list[Part], name: str) -> nn.Linear | Conv1D:
    module, mark, rest = name.rpartition(RESIDUAL)
    if not mark or rest:
        raise ValueError(f"{name} is not a residual; its name must end in {RESIDUAL}")
    for part in parts:
        try:
            layer = part.model.get_submodule(module)
        except AttributeError:
            continue
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if isinstance(base, (nn.Linear, Conv1D)):
            return base
    roles = " and ".join(part.role for part in parts)
    raise ValueError(f"{name}: the {roles} of this model has no linear layer {module}")


def block_linears(part: Part) -> list[str]:
    """Names, as in the whole model, of the linear layers in the part's blocks."""
    inside = tuple(f"{part.block_list}.{i}." for i in part.blocks)
    return [
        name
        for name, module in part.model.named_modules()
        if name.startswith(inside) and isinstance(module, (nn.Linear, Conv1D))
    ]


def initial_lora(name: str, like: Tensor, seed: int) -> Tensor:
    """Return the initial value of a LoRA tensor: uniform for A, zero for B, fp32.

    Parameters
    ----------
    name : str
        As in the whole model.
    like : Tensor
        Only its shape counts; it may be on the meta device.
    """
    if ".lora_A." not in name:
        return torch.zeros(like.shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    value = torch.empty(like.shape)
    nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
    return value


def _inject(
    model: PreTrainedModel, targets: list[str], lora: Lora, seed: int, freeze_a: bool
) -> None:
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        bias="none",
    )
    frozen = {id(p): p.requires_grad for p in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value = initial_lora(global_name(model, name), parameter, seed)
            parameter.data = value.to(parameter.device)
            parameter.requires_grad_(not (freeze_a and ".lora_A." in name))
        else:
            parameter.requires_grad_(frozen[id(parameter)])


def _choose(linears: list[str], lora: Lora) -> list[str]:
    """Return the linears that the settings name; all of them if they name none."""
    if not lora.target_modules:
        return linears
    chosen: set[str] = set()
    for target in lora.target_modules:
        found = {n for n in linears if n == target or n.endswith("." + target)}
        if not found:
            kinds = sorted({n.rpartition(".")[2] for n in linears})
            raise ValueError(
                f"lora.target_modules: {target!r} is no linear layer of these blocks; "
                f"they have {', '.join(kinds)}"
            )
        chosen |= found
    return [n for n in linears if n in chosen]


def _want(parameters: Iterable[nn.Parameter], role: str, wanted: bool) -> None:
    """Note on each parameter whether `role` trains it; a tied one is trained if any role does."""
    for parameter in parameters:
        roles = set(getattr(parameter, _WANTED_BY, ()))
        roles = roles | {role} if wanted else roles - {role}
        setattr(parameter, _WANTED_BY, frozenset(roles))
        parameter.requires_grad_(bool(roles) and parameter.is_floating_point())


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown tuning {mode!r}; must be one of {', '.join(MODES)}")


def _needed(lora: Lora | None) -> Lora:
    if lora is None:
        raise ValueError("tuning 'lora' needs the settings of the adapters (lora=...)")
    return lora
