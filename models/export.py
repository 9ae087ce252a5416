"""Save what was trained in three parts as one standard artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from models.adapters import Lora, initial_lora
from models.residuals import base_weight
from models.state import copy_into
from models.weights import ADAPTER, factor_shapes
from models.whole import outline

PREFIX = "base_model.model."
"""Begins the names in PEFT's files."""


def save_adapter(folder: str | Path, states: Mapping[str, Tensor], base: str, lora: Lora) -> Path:
    """Save the adapters of all parts as one PEFT folder.

    ``PeftModel.from_pretrained(base_model, folder)`` then gives the same logits. Only what has an
    adapter is targeted, by its full name: layers by `target_modules`; experts, and the layers whose
    names PEFT would take for experts of a family, by `target_parameters`, which take no dropout, so
    that none is saved beside them.

    Parameters
    ----------
    folder : path
        Created if need be.
    states : mapping
        LoRA tensors by global name (`trainable_state`, `client_state`).
    base : str
        Folder or hub id of the model that was adapted; its outline is read.
    lora : Lora
        The settings that the adapters were made with.

    Raises
    ------
    ValueError
        If a tensor is not a LoRA tensor, a pair is incomplete, or there are none.
    """
    pairs = _pairs(states)
    if ranks := {A.shape[0] for A, _ in pairs.values()} - {lora.rank}:
        raise ValueError(f"lora.rank is {lora.rank}, but the adapters have rank {sorted(ranks)}")
    model = outline(base)
    modules, parameters = _targets(model, pairs)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0 if parameters else lora.dropout,
        target_modules=sorted(modules),
        target_parameters=sorted(parameters.values()) or None,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(target))
    places = peft_places(model, pairs)
    tensors = {}
    for name, (A, B) in pairs.items():
        A = A.transpose(0, 1).flatten(0, 1) if A.ndim == 3 else A  # experts, then ranks
        for kind, tensor in (("A", A), ("B", B.flatten(1))):
            key = f"{PREFIX}{places[name]}.lora_{kind}.weight"
            tensors[key] = tensor.detach().cpu().contiguous().clone()
    tensors = _as_peft_reads(tensors, model, config)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


def peft_places(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return where PEFT has the adapter of each of these names, in a model without adapters."""
    modules, parameters = _targets(model, names)
    return {**{name: name for name in modules}, **_nested(model, parameters)}


def _pairs(states: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Sort LoRA tensors by what they adapt: A and B of each."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in states.items():
        adapted, mark, kind = name.rpartition(".lora_")
        if not mark or kind not in (f"A.{ADAPTER}.weight", f"B.{ADAPTER}.weight"):
            raise ValueError(f"{name} is not a LoRA tensor; save a fully trained model instead")
        halves.setdefault(adapted, {})[kind[0]] = tensor
    if not halves:
        raise ValueError("there are no adapters to save")
    if incomplete := sorted(name for name, own in halves.items() if len(own) != 2):
        raise ValueError(f"adapters need both lora_A and lora_B; incomplete: {incomplete[0]}")
    return {name: (own["A"], own["B"]) for name, own in halves.items()}


def _targets(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Divide what is adapted into PEFT's `target_modules`, and its `target_parameters` by name."""
    modules, parameters = [], {}
    taken = cache(lambda leaf: _taken_for_experts(leaf, model))
    layers = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    for name in names:
        if name not in layers:
            parameters[name] = name
        elif taken(name.rpartition(".")[2]):
            parameters[name] = f"{name}.weight"
        else:
            modules.append(name)
    return modules, parameters


def _taken_for_experts(leaf: str, model: PreTrainedModel) -> bool:
    """Whether PEFT rewrites targets of this last name to the fused experts of the family."""
    config = LoraConfig(target_modules=[f"layer.{leaf}"])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # PEFT misses the other layers that it believes to be fused with this one
        return True
    return config.target_modules != {f"layer.{leaf}"}


def _nested(model: PreTrainedModel, parameters: Mapping[str, str]) -> dict[str, str]:
    """Where PEFT has the adapters of parameters: one around the other, the last one outside."""
    own: dict[str, list[str]] = {}
    by_path = {path: name for name, path in parameters.items()}
    for path in dict(model.named_parameters(remove_duplicate=False)):
        if path in by_path:
            own.setdefault(path.rpartition(".")[0], []).append(by_path[path])
    return {
        name: module + ".base_layer" * depth
        for module, names in own.items()
        for depth, name in enumerate(reversed(names))
    }


def _as_peft_reads(
    tensors: dict[str, Tensor], model: PreTrainedModel, config: LoraConfig
) -> dict[str, Tensor]:
    """Call what PEFT takes for another name, as of a checkpoint, by the checkpoint's name."""

    def read(own: dict[str, Tensor]) -> set[str]:
        return set(convert_peft_adapter_state_dict_for_transformers(model, config, own))

    mistaken = tensors.keys() - read(tensors)
    renamings = [
        pair
        for entry in get_model_conversion_mapping(model)
        if mistaken and isinstance(entry, WeightRenaming)
        for pair in zip(entry.target_patterns, entry.source_patterns, strict=False)
    ]
    names = {}
    for key in mistaken:
        others = (key.replace(new, old) for new, old in renamings)
        found = next((other for other in others if read({other: tensors[key]}) == {key}), None)
        if found is None:
            raise ValueError(
                f"PEFT would not find {key} in a saved adapter of {config.base_model_name_or_path}"
            )
        names[key] = found
    return {names.get(key, key): tensor for key, tensor in tensors.items()}


def complete_pairs(
    state: Mapping[str, Tensor], model: PreTrainedModel, seed: int
) -> dict[str, Tensor]:
    """Add to the lora_B of a run that froze lora_A the values that lora_A has kept.

    Parameters
    ----------
    state : mapping
        LoRA tensors by global name; what is no lora_B, or has its lora_A, is left alone.
    model : PreTrainedModel
        The model without adapters; its weights are not read (`outline` makes one).
    seed : int
        As given to `tune`.
    """
    pairs = dict(state)
    for name, tensor in state.items():
        adapted, mark, kind = name.rpartition(".lora_B.")
        partner = f"{adapted}.lora_A.{kind}"
        if not mark or partner in state:
            continue
        found = base_weight(model, adapted)
        assert found is not None
        shape, _ = factor_shapes(found[0], tensor.shape[1], found[1])
        pairs[partner] = initial_lora(partner, torch.empty(shape, device="meta"), seed)
    return pairs


def save_full(
    folder: str | Path,
    config: PretrainedConfig,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Save a fully trained model as a folder for ``from_pretrained``.

    Parameters
    ----------
    folder : path
        Created if need be.
    config : PretrainedConfig
        Of the whole model.
    state : mapping
        Every parameter by global name; a tied one under any one of its names.
    tokenizer : PreTrainedTokenizerBase, optional
        Saved beside the model.

    Raises
    ------
    ValueError
        If a parameter is missing, unexpected or of another shape.
    """
    kinds = {tensor.dtype for tensor in state.values()} or {torch.float32}
    if len(kinds) != 1:
        raise ValueError(f"tensors of one model have one type, not {sorted(map(str, kinds))}")
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=kinds.pop())
    first: dict[int, str] = {}
    alias: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        alias[name] = first.setdefault(id(parameter), name)
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        own = alias.get(name, name)
        if own in renamed and not torch.equal(renamed[own], tensor):
            raise ValueError(f"{name} and {own} are tied, but their values differ")
        renamed[own] = tensor
    copy_into(dict(model.named_parameters()), renamed, "model")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target
