"""Builds the parts that a configuration describes, and puts them together again at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.schema import Config, ModelConfig
from flower_app.runs.folders import find_last_run
from models import (
    Cut,
    Part,
    build_scratch,
    complete_pairs,
    fold_residuals,
    load_client,
    load_client_state,
    load_part,
    load_trainable_state,
    load_whole,
    merge,
    named_trainable,
    outline,
    save_adapter,
    save_full,
    split,
    tune,
)
from models.residuals import RESIDUAL
from models.whole import make_config, parse_dtype, read_config

LAST = "last:"


def resolve_model(config: Config) -> Config:
    """Replace ``last:NAME`` in `model.path` by the folder of that experiment's newest model."""
    path = config.model.path
    if not path.startswith(LAST):
        return config
    folder = find_last_run(path.removeprefix(LAST), config.output.folder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))


def build_client(config: Config) -> tuple[Part, Part]:
    """Bottom and top of the configured model, tuned as configured, on the client's device."""
    model, device = config.model, config.runtime.client_device
    if model.scratch:
        parts = split(_scratch(config), _cut(config), allow_untested=model.allow_untested)
        bottom, top = parts.bottom.to(device), parts.top.to(device)
    else:
        bottom, top = load_client(model.path, _cut(config), device=device, **_loading(model))
    return _tune(bottom, config), _tune(top, config)


def build_trunk(config: Config) -> Part:
    """The trunk of the configured model, tuned as configured, on the server's device."""
    model, device = config.model, config.runtime.trunk_device
    if model.scratch:
        whole = _scratch(config)
        trunk = split(whole, _cut(config), allow_untested=model.allow_untested).trunk.to(device)
    else:
        trunk = load_part("trunk", model.path, _cut(config), device=device, **_loading(model))
    return _tune(trunk, config)


def describe(part: Part) -> str:
    """What a part was cut from: alike for parts of one model, wherever it was cut."""
    text = part.config.get_text_config(decoder=True)
    return (
        f"{part.config.model_type} of {part.num_blocks_total} blocks x {part.hidden_size}, "
        f"vocabulary {text.vocab_size}"
    )


def num_blocks(config: Config) -> int | None:
    """Blocks of the configured model, from its config alone; None where that takes reading it."""
    model = config.model
    if model.path.endswith(".gguf"):
        return None
    whole = make_config(model.scratch) if model.scratch else read_config(model.path)
    return int(whole.get_text_config(decoder=True).num_hidden_layers)


def export_model(
    config: Config,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> Path:
    """Save what was trained as one standard artifact.

    A PEFT adapter folder if only adapters were trained on a checkpoint, and its rank holds all
    of it; otherwise a `from_pretrained` folder of the whole model, with adapters merged in.

    Parameters
    ----------
    config : Config
        The run's configuration.
    state : mapping
        Trained tensors of all three parts, by their names in the whole model; adapters in the rank
        of `config`. What that rank could not hold is in ``"<module>.residual"``.
    tokenizer : PreTrainedTokenizerBase or None
        Saved beside the model.
    folder : Path
        Where to; created.
    """
    modes = {config.tuning.bottom, config.tuning.trunk, config.tuning.top}
    beyond_rank = any(name.endswith(RESIDUAL) for name in state)
    if "full" not in modes and config.model.path and not beyond_rank:
        pairs = dict(state)
        if config.aggregation.lora == "ffa":
            pairs = complete_pairs(state, outline(config.model.path), config.seed)
        save_adapter(folder, pairs, base=config.model.path, lora=config.lora)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder
    if modes == {"full"} and config.model.scratch:
        kind = parse_dtype(config.model.dtype)  # bf16 travels to the server as fp32
        state = {name: tensor.to(kind) for name, tensor in state.items()}
        save_full(folder, _scratch(config).config, dict(state), tokenizer=tokenizer)
        return folder
    whole = assemble(config, state)
    whole.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def assemble(config: Config, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The whole model with the trained tensors in place and adapters merged, in this process.

    `state` is as for `export_model`.
    """
    residuals, state = take_residuals(state)
    whole = _scratch(config) if config.model.scratch else _whole(config.model)
    parts = split(whole, _cut(config), allow_untested=config.model.allow_untested)
    for part in parts:
        _tune(part, config)
    fold_residuals(parts, residuals)
    of_trunk = named_trainable(parts.trunk).keys()
    load_trainable_state(parts.trunk, {name: state[name] for name in of_trunk if name in state})
    rest = {name: tensor for name, tensor in state.items() if name not in of_trunk}
    load_client_state(parts.bottom, parts.top, rest)
    merge(*parts)  # into weights that the parts share with the whole
    return whole


def take_residuals(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide named tensors into residuals, for `fold_residuals`, and trained ones."""
    residuals = {name: tensor for name, tensor in state.items() if name.endswith(RESIDUAL)}
    return residuals, {name: state[name] for name in state if name not in residuals}


def _tune(part: Part, config: Config) -> Part:
    mode, ffa = getattr(config.tuning, part.role), config.aggregation.lora == "ffa"
    return tune(part, mode, lora=config.lora, seed=config.seed, freeze_a=ffa)


def _scratch(config: Config) -> PreTrainedModel:
    model = config.model
    return build_scratch(model.scratch, config.seed, dtype=model.dtype, attention=model.attention)


def _whole(model: ModelConfig) -> PreTrainedModel:
    return load_whole(model.path, dtype=model.dtype, attention=model.attention)


def _loading(model: ModelConfig) -> dict[str, Any]:
    """How a part is read from a checkpoint, alike for all roles."""
    return {
        "dtype": model.dtype,
        "attention": model.attention,
        "allow_untested": model.allow_untested,
    }


def _cut(config: Config) -> Cut:
    return Cut(bottom=config.cut.bottom, top=config.cut.top)


def set_threads(count: int) -> None:
    """Torch threads of this process; 0 leaves torch's own choice."""
    if count > 0:
        torch.set_num_threads(count)
