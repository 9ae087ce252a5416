"""Save what was trained in three parts as one standard artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from models.adapters import ADAPTER, Lora, initial_lora
from models.state import copy_into


def save_adapter(folder: str | Path, states: Mapping[str, Tensor], base: str, lora: Lora) -> Path:
    """Save the adapters of all parts as one PEFT folder.

    ``PeftModel.from_pretrained(base_model, folder)`` then gives the same logits. Only the layers
    that have an adapter are targeted, each by its full name.

    Parameters
    ----------
    folder : path
        Created if need be.
    states : mapping
        LoRA tensors by global name (`trainable_state`, `client_state`).
    base : str
        Folder or hub id of the model that was adapted.
    lora : Lora
        The settings that the adapters were made with.

    Raises
    ------
    ValueError
        If a tensor is not a LoRA tensor, a pair is incomplete, or there are none.
    """
    pairs: dict[str, set[str]] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in states.items():
        module, mark, kind = name.rpartition(".lora_")
        if not mark or kind not in (f"A.{ADAPTER}.weight", f"B.{ADAPTER}.weight"):
            raise ValueError(f"{name} is not a LoRA tensor; save a fully trained model instead")
        pairs.setdefault(module, set()).add(kind[0])
        key = f"base_model.model.{module}.lora_{kind[0]}.weight"
        tensors[key] = tensor.detach().cpu().contiguous().clone()
    if not pairs:
        raise ValueError("there are no adapters to save")
    if halves := sorted(module for module, kinds in pairs.items() if len(kinds) != 2):
        raise ValueError(f"adapters need both lora_A and lora_B; incomplete: {halves[0]}")
    ranks = {t.shape[0] for k, t in tensors.items() if ".lora_A." in k}
    if ranks != {lora.rank}:
        raise ValueError(f"lora.rank is {lora.rank}, but the adapters have rank {sorted(ranks)}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(pairs),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.save_pretrained(str(target))
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


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
        module, mark, kind = name.rpartition(".lora_B.")
        partner = f"{module}.lora_A.{kind}"
        if not mark or partner in state:
            continue
        layer = model.get_submodule(module)
        assert isinstance(layer, (nn.Linear, Conv1D))
        width = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
        pairs[partner] = initial_lora(
            partner, torch.empty(tensor.shape[1], width, device="meta"), seed
        )
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
