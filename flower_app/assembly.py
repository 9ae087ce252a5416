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
from flower_app.runs import find_last_run
from models import (
    Cut,
    Part,
    build_scratch,
    load_client,
    load_client_state,
    load_part,
    load_trainable_state,
    load_whole,
    merge,
    named_trainable,
    save_adapter,
    save_full,
    split,
    tune,
)
from models.scratch import parse_dtype

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
    tune(bottom, config.tuning.bottom, lora=config.lora, seed=config.seed)
    tune(top, config.tuning.top, lora=config.lora, seed=config.seed)
    return bottom, top


def build_trunk(config: Config) -> Part:
    """The trunk of the configured model, tuned as configured, on the server's device."""
    model, device = config.model, config.runtime.trunk_device
    if model.scratch:
        whole = _scratch(config)
        trunk = split(whole, _cut(config), allow_untested=model.allow_untested).trunk.to(device)
    else:
        trunk = load_part("trunk", model.path, _cut(config), device=device, **_loading(model))
    tune(trunk, config.tuning.trunk, lora=config.lora, seed=config.seed)
    return trunk


def describe(part: Part) -> str:
    """What a part was cut from, and where: alike for parts that fit together."""
    text = part.config.get_text_config(decoder=True)
    return (
        f"{part.config.model_type} of {part.num_blocks_total} blocks x {part.hidden_size}, "
        f"vocabulary {text.vocab_size}, cut {part.cut}"
    )


def export_model(
    config: Config,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> Path:
    """Save what was trained as one standard artifact.

    A PEFT adapter folder if only adapters were trained on a checkpoint; otherwise a
    `from_pretrained` folder of the whole model, with adapters merged in where a run mixes both.

    Parameters
    ----------
    config : Config
        The run's configuration.
    state : mapping
        Trained tensors of all three parts, by their names in the whole model.
    tokenizer : PreTrainedTokenizerBase or None
        Saved beside the model.
    folder : Path
        Where to; created.
    """
    modes = {config.tuning.bottom, config.tuning.trunk, config.tuning.top}
    if "full" not in modes and config.model.path:
        save_adapter(folder, dict(state), base=config.model.path, lora=config.lora)
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
    """The whole model with the trained tensors in place and adapters merged, in this process."""
    whole = _scratch(config) if config.model.scratch else _whole(config.model)
    parts = split(whole, _cut(config), allow_untested=config.model.allow_untested)
    for part in parts:
        tune(part, getattr(config.tuning, part.role), lora=config.lora, seed=config.seed)
    of_trunk = named_trainable(parts.trunk).keys()
    load_trainable_state(parts.trunk, {name: state[name] for name in of_trunk if name in state})
    rest = {name: tensor for name, tensor in state.items() if name not in of_trunk}
    load_client_state(parts.bottom, parts.top, rest)
    merge(*parts)  # into weights that the parts share with the whole
    return whole


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
