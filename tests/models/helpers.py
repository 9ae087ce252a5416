"""Tiny models, and comparisons with the unsplit one, for the tests of `models`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import build_scratch
from models.families import NAMED
from models.tiny import roughen, tiny_config
from models.verify import PADDINGS, Difference, compare, example
from models.whole import has_sdpa

FAMILIES = [
    (family, attention)
    for family in NAMED
    for attention in ("sdpa", "eager")
    if attention == "eager" or has_sdpa(tiny_config(family))
]


def tiny(family: str, attention: str = "eager", **changes: Any) -> PreTrainedModel:
    """A random four-block model in evaluation mode, without a weight that is 0 or 1."""
    return roughen(build_scratch(tiny_config(family, **changes), 0, attention=attention)).eval()


def saved(
    folder: Path, family: str = "llama", shard: str = "20KB", **changes: Any
) -> PreTrainedModel:
    """A tiny model that is also saved in `folder`, in several shards."""
    model = tiny(family, **changes)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def differences(model: PreTrainedModel, parts: Iterable[Callable[..., Tensor]]) -> list[Difference]:
    """Compare on an unpadded, a left- and a right-padded batch."""
    own = list(parts)
    return [compare(model, own, *example(model.config, padding)) for padding in PADDINGS]


def assert_exact(
    model: PreTrainedModel, parts: Iterable[Callable[..., Tensor]], why: object
) -> None:
    for padding, gap in zip(PADDINGS, differences(model, parts), strict=True):
        assert gap.within(1e-5), f"{why}, padding {padding}: {gap}"


def run(parts: Iterable[Any], ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Logits of three parts."""
    x = ids_BT
    for part in parts:
        x = part(x, mask_BT)
    return x


def ids(seed: int = 0, batch: int = 2, tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 90, (batch, tokens), generator=generator)
