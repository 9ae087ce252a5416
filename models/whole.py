"""Whole models: with random weights from a config, or read from a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as hf_logging

from models.anatomy import find_blocks
from models.buffers import make_buffers, without_masks

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ATTENTIONS = ("sdpa", "eager")

# Keys that every config takes though its class does not list them.
_COMMON_KEYS = {
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "transformers_version",
}


def parse_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``fp32``, ``bfloat16`` and the like."""
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; {_nearest(name, _DTYPES)}")
    return _DTYPES[name]


def parse_attention(name: str, config: PretrainedConfig | None = None) -> str:
    """Return `name` if it is a tested attention implementation that the family has."""
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attention {name!r}; {_nearest(name, ATTENTIONS)}")
    if config is not None and name == "sdpa" and not has_sdpa(config):
        raise ValueError(f"{config.model_type} has no sdpa attention; set attention to eager")
    return name


def has_sdpa(config: PretrainedConfig) -> bool:
    """Return whether transformers implements sdpa attention for the family."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(kind, "_supports_sdpa", False))


def build_scratch(
    config: Mapping[str, Any] | PretrainedConfig,
    seed: int,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Build a causal LM with random weights.

    Parameters
    ----------
    config : mapping or PretrainedConfig
        A mapping needs ``model_type``, ``{"model_type": "llama", "hidden_size": 64}`` say.
    seed : int
        The weights are a function of the config and the seed; the global generator stays as it is.
    dtype, attention : str

    Returns
    -------
    PreTrainedModel
        In training mode, on the CPU.

    Raises
    ------
    ValueError
        If the model type is not a causal LM or a key of the config is unknown.
    """
    built = config if isinstance(config, PretrainedConfig) else make_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            built, dtype=parse_dtype(dtype), attn_implementation=parse_attention(attention, built)
        )
    return model.train()


def make_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """Build a `transformers` config from a mapping; a wrong type or key is refused."""
    values = dict(settings)
    kind = values.pop("model_type", "")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type {kind!r} is not a causal language model that transformers knows; "
            f"{_nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    default = AutoConfig.for_model(kind)
    known = {
        *default.to_dict(),
        *default.attribute_map,
        *_annotations(type(default)),
        *_COMMON_KEYS,
    }
    for key in values:
        if key not in known:
            raise ValueError(f"{kind} config has no key {key!r}; {_nearest(key, known)}")
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # each config class has checks and exceptions of its own
        raise ValueError(f"{kind} config is refused by transformers: {error}") from error


def read_config(path_or_id: str) -> PretrainedConfig:
    """Read the config of a checkpoint; say in words what is wrong with it."""
    try:
        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the config of {path_or_id}: {error}") from error


def outline(path_or_id: str) -> PreTrainedModel:
    """Return a checkpoint's model without its weights; a ``.gguf`` file is read for it."""
    return (
        load_whole(path_or_id)
        if path_or_id.endswith(".gguf")
        else build_hollow(read_config(path_or_id))
    )


def build_hollow(config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """Build the causal LM of a config without memory for weights; its outline runs all the same."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **how)
    make_buffers(model, outside=find_blocks(model))
    return model


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bars while weights are read."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def load_whole(
    path_or_id: str,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """Read a whole causal LM, strictly.

    Parameters
    ----------
    path_or_id : str
        Folder, hub id, or a ``.gguf`` file (which needs the `gguf` package).
    dtype, attention : str
    gguf_file : str, optional
        Name of a GGUF file in the folder or repository.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        If tensors are missing, unexpected or of the wrong shape.
    """
    if gguf_file is None and path_or_id.endswith(".gguf"):
        path_or_id, gguf_file = str(Path(path_or_id).parent), Path(path_or_id).name
    extra: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    kind = parse_dtype(dtype)
    # A GGUF config takes as long to read as the weights.
    config = None if gguf_file else read_config(path_or_id)
    how = parse_attention(attention, config)
    if config is not None and config.output_attentions:
        config.output_attentions = False  # refused with sdpa, and nobody asks for them
        extra["config"] = config
    try:
        with no_progress_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                path_or_id,
                dtype=kind,
                attn_implementation=how,
                output_loading_info=True,
                **extra,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load {path_or_id}: {error}") from error
    info["unexpected_keys"] = without_masks(info["unexpected_keys"])
    problems = [f"{key}: {sorted(map(str, info[key]))[:8]}" for key in info if info[key]]
    if problems:
        raise ValueError(f"{path_or_id} does not fit its own config; {'; '.join(problems)}")
    if gguf_file is not None:
        _forget_quantization(model)
    return model


def _forget_quantization(model: PreTrainedModel) -> None:
    """Let `transformers` save a model read from GGUF: its weights are ordinary by now."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _annotations(kind: type) -> set[str]:
    return {key for base in kind.__mro__ for key in vars(base).get("__annotations__", {})}


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return (
        f"did you mean {close[0]!r}?" if close else f"one of {', '.join(sorted(known)[:12])}, ..."
    )
