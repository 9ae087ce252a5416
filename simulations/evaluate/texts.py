"""What a model is evaluated on: a file read as training reads it, and the answers in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from conf.load import read_value
from conf.rules import ConfigError
from conf.schema import Config, DataConfig
from flower_app.client.plan import check_embeds
from flower_app.data.client import IGNORED, Example, load_client_data

CONTEXT = 1024
"""Most tokens of an example where no run says it, if the model has as many positions."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A prompt, and what follows it to the end of the example."""

    prompt_T: Tensor
    completion_T: Tensor


def read_texts(
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: PretrainedConfig,
    *,
    config: Config | None = None,
    changes: Sequence[str] = (),
    limit: int = 0,
) -> list[Example]:
    """Read a file or folder into examples, in its order.

    Parameters
    ----------
    file : Path
        jsonl, csv, parquet or txt: whatever `data.path` may be.
    tokenizer : PreTrainedTokenizerBase
        The model's.
    model : PretrainedConfig
        Of the model, whose vocabulary and positions the examples must fit.
    config : Config, optional
        Of the run, whose `data` says columns and context.
    changes : sequence of str
        ``data.KEY=VALUE``, over the run's.
    limit : int
        Most examples; 0: all.

    Raises
    ------
    ValueError
        If the file cannot be read, has no example, or does not fit the model.
    """
    text = model.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or CONTEXT
    data = config.data if config is not None else DataConfig(context=min(CONTEXT, positions))
    data = replace(
        data,
        **{
            "source": "files", "path": str(file.expanduser().absolute()), "name": "",
            "partitioner": "iid", "partition_by": "", "heldout": 0.0, "central_path": "",
            "max_examples": limit, **_changed(changes),
        },
    )  # fmt: skip
    found = load_client_data(
        data, tokenizer, partition=0, partitions=1, data_path=data.path, seed=0
    )
    check_embeds(model, found.train, data.context)
    return found.train


def answers_of(examples: Sequence[Example]) -> list[Answer]:
    """Return prompt and completion of those that are one prompt and one completion."""
    found = []
    for example in examples:
        learned = (example.labels != IGNORED).nonzero().flatten()
        first, last = int(learned[0]), int(learned[-1])
        if first and last - first + 1 == len(learned) and last + 1 == len(example.labels):
            found.append(Answer(example.input_ids[:first], example.input_ids[first:]))
    return found


def padded_left(prompts: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B, T) of texts that end together, as generation needs them."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = prompt
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT, mask_BT


def _changed(changes: Sequence[str]) -> dict[str, Any]:
    found = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.startswith("data."):
            raise ConfigError(f"{change!r}: what may be changed here is data.KEY=VALUE")
        found[key.removeprefix("data.")] = read_value(key, text)
    return found
