"""What is trained in a part: everything, LoRA adapters, or nothing.

LoRA (Hu et al. 2021, arXiv:2106.09685) of layers is peft's, that of stacked experts equals peft's
(`weights`); `targets` says what may have an adapter. Initial values are a function of the seed and
the tensor's name in the whole model, so that a split model, the unsplit one and every client start
alike whatever they build first.

Under FFA-LoRA (Sun et al. 2024, arXiv:2403.12313) lora_A keeps these values, so that the mean of
lora_B is the mean of the products.

A tied embedding is one Parameter in bottom and top: it is trained if either of them is ``full``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.anatomy import set_module
from models.cut import ROLES, Cut
from models.parts import Part, split_unchecked
from models.state import global_name
from models.targets import Target
from models.weights import ADAPTER, WeightLora

MODES = ("full", "lora", "frozen")
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
        ``full``: every weight. ``lora``: adapters on the linear layers and experts of its blocks,
        in fp32; a part without blocks gets none. ``frozen``: nothing.
    lora : Lora, optional
        Needed by ``lora``. Empty `target_modules`: all that can be adapted.
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
        If the mode is unknown, `lora` is absent, or a target is in no block of the whole model,
        cannot be adapted, or takes no dropout.
    """
    _check_mode(mode)
    _want(part.parameters(), part.role, mode == "full")
    if mode == "lora" and len(part.blocks):
        _inject(part.model, part.block_list, _chosen(part, lora), _needed(lora), seed, freeze_a)
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
    chosen: list[Target] = []
    parts = split_unchecked(model, cut)
    for part in parts:
        mode = modes[part.role]
        _check_mode(mode)
        _want(part.parameters(), part.role, mode == "full")
        if mode == "lora" and len(part.blocks):
            chosen += _chosen(part, lora)
    if chosen:
        _inject(model, parts.trunk.block_list, chosen, _needed(lora), seed, freeze_a)
    return model


def adapted_shares(part: Part, modes: Mapping[str, str], lora: Lora) -> dict[str, float]:
    """Tell which share of each part's weights has an adapter, from any one part of the model.

    Parameters
    ----------
    part : Part
        Tuned or not; the other parts are those of its cut.
    modes : mapping
        As in `tune`, by role; only parts of mode ``lora`` are told of.
    """
    roles = [role for role in ROLES if modes[role] == "lora"]
    chosen = part.inventory.choose(lora.target_modules, lora.dropout) if roles else ()
    ranges = part.cut.ranges(part.num_blocks_total)
    return {role: part.inventory.share(chosen, role, ranges[role]) for role in roles}


def merge(*modules: nn.Module) -> int:
    """Add adapters to the weights they adapt and remove them, in place.

    Parameters
    ----------
    *modules : Part or PreTrainedModel
        A part of a split model changes the weights that it shares with the whole model.

    Returns
    -------
    int
        Adapted weights; parts may have none.

    Raises
    ------
    ValueError
        If a whole model has none: parts of a split model have their adapters to themselves, so
        merging the whole would do nothing.
    """
    count = 0
    for module in modules:
        for name, layer in reversed(list(module.named_modules())):  # inner ones first
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)
            elif isinstance(layer, WeightLora):
                layer.merge()
            else:
                continue
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._modules[leaf] = layer.base_layer
            count += len(layer.adapted) if isinstance(layer, WeightLora) else 1
    if not count and not all(isinstance(module, Part) for module in modules):
        raise ValueError("there are no adapters to merge; merge the parts that were tuned")
    return count


def block_linears(part: Part) -> list[str]:
    """Names, as in the whole model, of all that can be adapted in the part's blocks."""
    return [target.name for target in part.inventory.targets if target.block in part.blocks]


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
    # Of experts, each row by itself: the bound depends on the number of inputs alone.
    rows = value.view(-1, value.shape[-1])
    nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
    return value


def _inject(
    model: PreTrainedModel,
    block_list: str,
    targets: Sequence[Target],
    lora: Lora,
    seed: int,
    freeze_a: bool,
) -> None:
    frozen = {id(p): p.requires_grad for p in model.parameters()}
    blocks = model.get_submodule(block_list)
    own = [(t.name.removeprefix(block_list + "."), t.parameter) for t in targets]
    _inject_layers(blocks, [name for name, parameter in own if not parameter], lora)
    _wrap_weights(blocks, [name for name, parameter in own if parameter], lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value = initial_lora(global_name(model, name), parameter, seed)
            parameter.data = value.to(parameter.device)
            parameter.requires_grad_(not (freeze_a and ".lora_A." in name))
        else:
            parameter.requires_grad_(frozen[id(parameter)])


def _inject_layers(blocks: nn.Module, names: list[str], lora: Lora) -> None:
    """Let PEFT adapt these layers; it sees no model, whose targets it might change."""
    if not names:
        return
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=isinstance(blocks.get_submodule(names[0]), Conv1D),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, blocks, adapter_name=ADAPTER)


def _wrap_weights(blocks: nn.Module, names: list[str], lora: Lora) -> None:
    by_owner: dict[str, list[str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        by_owner.setdefault(owner, []).append(leaf)
    for owner, leaves in by_owner.items():
        wrapped = WeightLora(blocks.get_submodule(owner), leaves, lora.rank, lora.alpha)
        set_module(blocks, owner, wrapped)


def _chosen(part: Part, lora: Lora | None) -> list[Target]:
    """The targets in a part's own blocks; a name in other blocks alone is no mistake."""
    lora = _needed(lora)
    chosen = part.inventory.choose(lora.target_modules, lora.dropout)
    return [target for target in chosen if target.block in part.blocks]


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
