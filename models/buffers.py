"""Compute the buffers of a model that was built without memory; checkpoints leave them out."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

_CAUSAL_MASK = re.compile(r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$")


def without_masks(keys: Iterable[str]) -> set[str]:
    """Leave out the causal masks that GPT-2 and its kin once saved: unknown keys of these names.

    transformers computes them, and ignores these keys in some of the families only.
    """
    return {key for key in keys if not _CAUSAL_MASK.search(key)}


def make_buffers(model: PreTrainedModel, outside: str | None = None) -> None:
    """Compute rotary frequencies and the like, in place; none of the modules inside `outside`."""
    home: dict[str, PreTrainedModel] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PreTrainedModel):
            home[name] = module
        if outside and name.startswith(outside + "."):
            continue
        absent = [k for k, b in module._buffers.items() if b is not None and b.is_meta]
        if not absent:
            continue
        for key in absent:
            buffer = module._buffers[key]
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[key] = torch.full_like(buffer, fill, device="cpu")
        owner = home[max((n for n in home if (name + ".").startswith(n + ".") or not n), key=len)]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            owner._init_weights(module)
        for key in set(absent) & set(module._non_persistent_buffers_set):
            if torch.isnan(module._buffers[key]).any():
                raise ValueError(f"cannot compute the buffer {name}.{key}; load the model whole")
