"""Builds the parts that a configuration describes: from random weights, a model, or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from conf.schema import Config, ModelConfig
from flower_app.runs.folders import find_last_run
from models import (
    Cut,
    Part,
    build_scratch,
    client_state,
    load_client,
    load_part,
    load_whole,
    named_trainable,
    outline,
    split,
    tune,
)
from models.bridge import Bridge, bridge_state
from models.continued import check_adapted, merge_adapter, take_over
from models.parts import split_unchecked
from models.residuals import RESIDUAL
from models.source import Source, find_source
from models.state import copy_into
from models.whole import make_config, read_config
from strategies.optim import ALONE, derive_seed
from strategies.records import Form

LAST = "last:"


def resolve_model(config: Config) -> Config:
    """Find what the configuration starts from, and refuse what is no model before it is loaded.

    Returns
    -------
    Config
        With the folder in place of ``last:NAME``, and in `model.base` the base of an adapter.

    Raises
    ------
    ValueError
        If there is no such model, or an adapter does not fit its base.
    """
    model = config.model
    if model.scratch:
        return config
    if model.path.startswith(LAST):
        folder = find_last_run(model.path.removeprefix(LAST), config.output.folder)
        model = replace(model, path=str(folder))
    source = source_of(model)
    if source.adapter is not None:
        try:
            whole = outline(source.base)
        except ValueError as error:
            raise ValueError(
                f"model.path {model.path} is an adapter of {source.base}: {error}; set model.base "
                "to where that model is now"
            ) from error
        check_adapted(source.adapter, whole)
        model = replace(model, base=source.base)
    return replace(config, model=model)


def source_of(model: ModelConfig) -> Source:
    """What `model.path` and `model.base` name."""
    return find_source(model.path, model.base)


def build_client(config: Config) -> tuple[Part, Part]:
    """Bottom and top of the configured model, tuned as configured, on the client's device."""
    with ALONE:
        return _build_client(config)


def _build_client(config: Config) -> tuple[Part, Part]:
    model, device = config.model, config.runtime.client_device
    if model.scratch:
        parts = split(_scratch(config), cut_of(config), allow_untested=model.allow_untested)
        bottom, top = parts.bottom.to(device), parts.top.to(device)
    else:
        base = source_of(model).base
        bottom, top = load_client(base, cut_of(config), device=device, **_loading(model))
    start([bottom, top], config)
    return bottom, top


def own_names(config: Config, bottom: Part, top: Part) -> set[str]:
    """Names of what is trained in a client's ends and never leaves it (`aggregation.ends`).

    Raises
    ------
    ValueError
        If the top is to stay while the bottom is averaged, and both are one tensor.
    """
    ends = config.aggregation.ends
    if ends == "average":
        return set()
    if ends == "local":
        return {*named_trainable(bottom, top)}
    below, above = named_trainable(bottom), named_trainable(top)
    tied = {id(parameter) for parameter in below.values()}
    if both := [name for name, parameter in above.items() if id(parameter) in tied]:
        raise ValueError(
            f"aggregation.ends={ends} keeps the top at its client and averages the bottom, and "
            f"this model's head is its embedding ('{both[0]}'), which is trained: set "
            "aggregation.ends=local, or tune the ends with lora"
        )
    return {*above}


def client_form(config: Config, cut: Cut, rank: int) -> Form:
    """Names and shapes of what a client of this cut and rank trains and answers with; a
    checkpoint's weights are not read for it."""
    own = replace(
        config,
        cut=replace(config.cut, bottom=cut.bottom, top=cut.top),
        lora=replace(config.lora, rank=rank),
        runtime=replace(config.runtime, client_device="cpu"),
    )
    if own.model.scratch:
        bottom, top = build_client(own)
    else:
        parts = split_unchecked(outline(source_of(own.model).base), cut)
        bottom, top = _tune(parts.bottom, own), _tune(parts.top, own)
    own_tensors = own_names(own, bottom, top)
    state = client_state(bottom, top)
    if bridge := build_bridge(own, bottom):
        state |= bridge_state(bridge)
    return {name: tuple(t.shape) for name, t in state.items() if name not in own_tensors}


def build_bridge(config: Config, bottom: Part) -> Bridge | None:
    """The bridge that every client begins with; None without `train.bridge`."""
    if not config.train.bridge:
        return None
    seed = derive_seed(config.seed, "bridge")
    device = next(bottom.parameters()).device
    return Bridge(bottom.hidden_size, config.train.bridge, seed=seed).to(device)


def build_trunk(config: Config) -> Part:
    """The trunk of the configured model, tuned as configured, on the server's device."""
    model, device = config.model, config.runtime.trunk_device
    if model.scratch:
        whole = _scratch(config)
        trunk = split(whole, cut_of(config), allow_untested=model.allow_untested).trunk.to(device)
    else:
        base = source_of(model).base
        trunk = load_part("trunk", base, cut_of(config), device=device, **_loading(model))
    start([trunk], config)
    return trunk


def build_whole(config: Config) -> PreTrainedModel:
    """The base of the configured model, unsplit; neither an adapter nor tuning is applied."""
    if config.model.scratch:
        return _scratch(config)
    model = config.model
    return load_whole(source_of(model).base, dtype=model.dtype, attention=model.attention)


def start(parts: list[Part], config: Config) -> None:
    """Tune parts of the base as configured, and let an adapter have its say, in place.

    The adapter that is trained further gives the first values; another one is merged before.
    """
    adapter = None if config.model.scratch else source_of(config.model).adapter
    first = first_values(config)
    for part in parts:
        if adapter is not None and first is None:
            merge_adapter(part, adapter)
        _tune(part, config)
        if first is not None:
            own = named_trainable(part)
            copy_into(own, {name: first[name] for name in own}, part.role)


def first_values(config: Config) -> dict[str, Tensor] | None:
    """The adapter at `model.path`, if it is the very one that the configuration trains; else None.

    Only the plain mean of factors keeps it one adapter, of one rank at every node.
    """
    source = None if config.model.scratch else source_of(config.model)
    if source is None or source.adapter is None or config.aggregation.lora != "factors":
        return None
    whole = outline(source.base)
    trained: dict[str, Tensor] = {}
    for part in split_unchecked(whole, cut_of(config)):
        trained.update(named_trainable(_tune(part, config)))
    return take_over(source.adapter, whole, trained, config.lora)


def describe_start(config: Config) -> str:
    """What becomes of the adapter at `model.path`, for the run's log; empty if there is none."""
    source = None if config.model.scratch else source_of(config.model)
    if source is None or source.adapter is None:
        return ""
    if first_values(config) is not None:
        return f"training goes on from the adapter {source.adapter} of {source.base}"
    return (
        f"the adapter {source.adapter} is merged into its base {source.base}: what is trained now "
        "is not the same adapter (lora.rank, lora.alpha, lora.target_modules, tuning.*, "
        "aggregation.lora=factors)"
    )


def describe(part: Part) -> str:
    """What a part was cut from: alike for parts of one model, wherever it was cut."""
    return in_words(part.config, part.num_blocks_total, part.hidden_size)


def in_words(config: PretrainedConfig, num_blocks: int, hidden_size: int) -> str:
    """A model in words."""
    text = config.get_text_config(decoder=True)
    return (
        f"{config.model_type} of {num_blocks} blocks x {hidden_size}, vocabulary {text.vocab_size}"
    )


def num_blocks(config: Config) -> int | None:
    """Blocks of the configured model, from its config alone; None where that takes reading it."""
    model = config.model
    if model.path.endswith(".gguf"):
        return None
    whole = make_config(model.scratch) if model.scratch else read_config(source_of(model).base)
    blocks = getattr(whole.get_text_config(decoder=True), "num_hidden_layers", None)
    return blocks if isinstance(blocks, int) else None


def take_residuals(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Divide named tensors into residuals, for `fold_residuals`, and trained ones."""
    residuals = {name: tensor for name, tensor in state.items() if name.endswith(RESIDUAL)}
    return residuals, {name: state[name] for name in state if name not in residuals}


def cut_of(config: Config) -> Cut:
    """The configured cut."""
    return Cut(bottom=config.cut.bottom, top=config.cut.top)


def set_threads(count: int) -> None:
    """Torch threads of this process; 0 leaves torch's own choice."""
    if count > 0:
        torch.set_num_threads(count)


def _tune(part: Part, config: Config) -> Part:
    mode, ffa = getattr(config.tuning, part.role), config.aggregation.lora == "ffa"
    return tune(part, mode, lora=config.lora, seed=config.seed, freeze_a=ffa)


def _scratch(config: Config) -> PreTrainedModel:
    model = config.model
    return build_scratch(model.scratch, config.seed, dtype=model.dtype, attention=model.attention)


def _loading(model: ModelConfig) -> dict[str, Any]:
    """How a part is read from a checkpoint, alike for all roles."""
    return {
        "dtype": model.dtype,
        "attention": model.attention,
        "allow_untested": model.allow_untested,
    }
