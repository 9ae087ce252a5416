"""What this client keeps of its examples' activations, and how it names them (`link.cache_mb`)."""

from __future__ import annotations

import hmac

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import nn

from flower_app.data.client import Batch
from strategies.engine.checks import has_dropout
from strategies.optim import trainable
from strategies.records import from_arrays, to_arrays
from strategies.transport.cache import Cache
from strategies.transport.rows import NAME

TENSORS, TAGS = "graft-cache", "graft-cache-tags"
"""Records in `context.state`, which lasts as long as Flower's run and the SuperNode."""


def load_cache(state: RecordDict, cache_mb: float) -> Cache:
    """What was kept in earlier rounds, within so many MiB."""
    cache = Cache(int(cache_mb * 2**20))
    if TENSORS in state.array_records:
        tags = {name: int(str(tag)) for name, tag in state.config_records[TAGS].items()}
        cache.load_state_dict(from_arrays(state.array_records[TENSORS]), tags)
    return cache


def save_cache(state: RecordDict, cache: Cache) -> None:
    """Keep it for the next round."""
    tensors, tags = cache.state_dict()
    if tensors:
        state[TENSORS] = to_arrays(tensors)
        state[TAGS] = ConfigRecord({name: str(tag) for name, tag in tags.items()})


def names_of(secret: bytes, batch: Batch) -> list[bytes]:
    """Names of a batch's examples: the same for the same tokens and labels, whatever the padding,
    and without the secret nobody can tell what they stand for."""
    both_B2T = torch.stack([batch.input_ids, batch.labels], dim=1)
    return [
        hmac.digest(secret, both_2T[:, here_T.bool()].numpy().tobytes(), "sha256")[:NAME]
        for both_2T, here_T in zip(both_B2T, batch.attention_mask, strict=True)
    ]


def check_same(bottom: nn.Module) -> None:
    """Refuse to name activations that are not the same each time; `ValueError` with the remedy."""
    if trainable(bottom):
        why = "the bottom shares a tensor with the top (tied embeddings), which learns"
        remedy = "tuning.top=lora or frozen"
    elif has_dropout(bottom):
        why, remedy = "the bottom has dropout", "no dropout in the model's configuration"
    else:
        return
    raise ValueError(
        f"link.cache_mb keeps what the bottom makes of an example, and {why}, so that it makes "
        f"something else each time; set link.cache_mb=0, or mend that: {remedy}"
    )
