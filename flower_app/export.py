"""Puts what was trained in three parts together again, as one standard artifact."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.schema import Config
from flower_app.beside import keep_privacy
from flower_app.build import build_whole, cut_of, first_values, source_of, start, take_residuals
from models import (
    complete_pairs,
    fold_residuals,
    load_client_state,
    load_trainable_state,
    merge,
    named_trainable,
    outline,
    save_adapter,
    save_full,
    split,
)
from models.bridge import take_bridge
from models.source import generation_settings
from models.whole import parse_dtype


def export_model(
    config: Config,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> Path:
    """Save what was trained as one standard artifact.

    A PEFT adapter folder if what was trained is an adapter of a model on disk, and its rank holds
    all of it; otherwise a `from_pretrained` folder of the whole model, with adapters merged in.

    Parameters
    ----------
    config : Config
        The run's configuration.
    state : mapping
        Trained tensors of all three parts, by their names in the whole model; adapters in the rank
        of `config`. What that rank could not hold is in ``"<module>.residual"``. A bridge's are no
        part of the artifact.
    tokenizer : PreTrainedTokenizerBase or None
        Saved beside the model, as is how it generates if it is not told, and the run's `privacy`.
    folder : Path
        Where to; created.
    """
    _, state = take_bridge(state)
    if _is_adapter(config, state):
        base, pairs = source_of(config.model).base, dict(state)
        if config.aggregation.lora == "ffa":
            pairs = complete_pairs(state, outline(base), config.seed)
        save_adapter(folder, pairs, base=base, lora=config.lora)
        if (settings := generation_settings(base)) is not None:
            shutil.copyfile(settings, folder / settings.name)
    elif config.model.scratch and _modes(config) == {"full"}:
        kind = parse_dtype(config.model.dtype)  # bf16 travels to the server as fp32
        typed = {name: tensor.to(kind) for name, tensor in state.items()}
        save_full(folder, build_whole(config).config, typed)
    else:
        assemble(config, state).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    keep_privacy(config.privacy, folder)
    return folder


def assemble(config: Config, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The whole model with the trained tensors in place and adapters merged, in this process.

    `state` is as for `export_model`.
    """
    residuals, state = take_residuals(take_bridge(state)[1])
    whole = build_whole(config)
    parts = split(whole, cut_of(config), allow_untested=config.model.allow_untested)
    start(list(parts), config)
    fold_residuals(parts, residuals)
    of_trunk = named_trainable(parts.trunk).keys()
    load_trainable_state(parts.trunk, {name: state[name] for name in of_trunk if name in state})
    rest = {name: tensor for name, tensor in state.items() if name not in of_trunk}
    load_client_state(parts.bottom, parts.top, rest)
    merge(*parts)  # into weights that the parts share with the whole
    return whole


def _is_adapter(config: Config, state: Mapping[str, Tensor]) -> bool:
    """Whether the trained tensors, added to a model on disk, are all there is."""
    if "full" in _modes(config) or config.model.scratch or take_residuals(state)[0]:
        return False
    return source_of(config.model).adapter is None or first_values(config) is not None


def _modes(config: Config) -> set[str]:
    return {config.tuning.bottom, config.tuning.trunk, config.tuning.top}
