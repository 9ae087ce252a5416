"""What a client trains on: its examples, held-out ones apart, and the batches made of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from conf.schema import DataConfig, TrainConfig
from flower_app.data.partition import take_partition
from flower_app.data.sources import load_rows
from flower_app.data.tables import DataError, reason
from flower_app.data.text import IGNORED, Example, cut, encode, load_tokenizer

__all__ = [
    "IGNORED",
    "Batch",
    "ClientData",
    "Example",
    "batches",
    "load_client_data",
    "load_tokenizer",
    "num_steps",
    "steps",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ClientData:
    """The examples of one client."""

    name: str
    """Where they come from, for the log."""
    train: list[Example]
    heldout: list[Example]
    documents: int
    """Documents of which at least one example was made."""
    skipped: int
    """Documents without text, or in which nothing can be learned."""


@dataclass(frozen=True, eq=False)
class Batch:
    """B examples padded on the right to the longest; all tensors are (B, T) int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    """1 for a token, 0 for padding."""
    labels: torch.Tensor
    """The token's own id, or -100 for padding and what is not learned. Not shifted."""

    @cached_property
    def tokens(self) -> int:
        """Number of labels that count after the shift: the denominator of the mean loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def load_client_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    partition: int,
    partitions: int,
    data_path: str = "",
    seed: int,
) -> ClientData:
    """Load, divide and encode the data of one client; the same arguments give the same examples.

    Parameters
    ----------
    config : DataConfig
        Source, columns, partitioner, context and held-out share.
    tokenizer : PreTrainedTokenizerBase
        As `load_tokenizer` returns it.
    partition, partitions : int
        The client's number, from 0, and how many there are.
    data_path : str
        A node's own file or folder: read instead of the configured source, and not divided.
    seed : int
        The run's seed, the same at every client.

    Raises
    ------
    DataError
        If the data is missing, unreadable, cannot be divided, or gives this client no example. It
        quotes none of the data: it travels to the server. What else goes wrong is in this log.
    """
    where = data_path or config.path or "the built-in text"
    try:
        return _load(config, tokenizer, where, partition, partitions, data_path, seed)
    except DataError:
        raise
    except Exception as error:
        logger.exception("%s cannot be used", where)
        raise DataError(
            f"{where} cannot be used: {reason(error)} (the client's own log has the details)"
        ) from None


def _load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    partition: int,
    partitions: int,
    data_path: str,
    seed: int,
) -> ClientData:
    rows = load_rows(config, data_path)
    name = where
    if not data_path:
        rows = take_partition(rows, config, partition=partition, partitions=partitions, seed=seed)
        name = f"{where}, partition {partition + 1} of {partitions} ({config.partitioner})"
    documents: list[list[Example]] = []
    skipped = examples = 0
    for index, row in enumerate(rows):
        try:
            encoded = encode(row, config, tokenizer)
        except DataError as error:
            raise DataError(f"document {index} of {name}: {error}") from None
        found = cut(encoded, config, f"document {index} of {name}") if encoded else []
        if config.max_examples:
            found = found[: config.max_examples - examples]
        documents.extend([found] if found else [])
        skipped += not found
        examples += len(found)
        if examples == config.max_examples > 0:
            break
    if not documents:
        column = config.messages_column or config.completion_column or config.text_column
        raise DataError(
            f"{name} has no example: {len(rows)} documents, {skipped} of them empty in column "
            f"{column!r} or without anything to learn in data.context={config.context} tokens"
        )
    if skipped:
        logger.warning("%s: %d documents skipped, nothing to learn in them", name, skipped)
    train, heldout = split_heldout(documents, config.heldout, seed=seed, partition=partition)
    return ClientData(name, train, heldout, len(documents), skipped)


def split_heldout(
    documents: Sequence[list[Example]], share: float, *, seed: int, partition: int
) -> tuple[list[Example], list[Example]]:
    """Split the examples of documents into training and held-out ones.

    Whole documents are held out, in random order, as far as they fit into the share, so that no
    document is in both; if even the first ones are larger than that, windows are held out instead.
    A positive share of two or more examples holds out at least one.
    """
    examples = sum(len(document) for document in documents)
    if share == 0 or examples < 2:
        return [example for document in documents for example in document], []
    target = max(1, round(share * examples))
    random = np.random.default_rng([seed, partition])
    held: set[int] = set()
    count = 0
    for index in random.permutation(len(documents)).tolist():
        if count + len(documents[index]) <= target:
            held.add(index)
            count += len(documents[index])
    if not held:
        every = [example for document in documents for example in document]
        chosen = set(random.permutation(examples)[:target].tolist())
        return (
            [example for index, example in enumerate(every) if index not in chosen],
            [example for index, example in enumerate(every) if index in chosen],
        )
    return (
        [e for index, document in enumerate(documents) if index not in held for e in document],
        [e for index, document in enumerate(documents) if index in held for e in document],
    )


def batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """Yield one epoch of batches; the last may be smaller.

    Parameters
    ----------
    pad_id : int
        Fills `input_ids` where the mask is 0.
    generator : torch.Generator | None
        Shuffles the examples; None keeps their order.

    Raises
    ------
    ValueError
        If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    order = range(len(examples))
    if generator is not None:
        order = torch.randperm(len(examples), generator=generator).tolist()
    for start in range(0, len(order), batch_size):
        yield _collate([examples[index] for index in order[start : start + batch_size]], pad_id)


def steps(
    examples: Sequence[Example],
    *,
    batch_size: int,
    accumulate: int,
    steps: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of exactly `steps` optimizer steps.

    Epochs follow one another, each shuffled anew. A step does not reach into the next epoch: the
    last of an epoch may have fewer than `accumulate` micro-batches, which is why a loss is divided
    by the tokens of the step, not by the number of micro-batches.

    Raises
    ------
    ValueError
        If there are no examples, or `batch_size` or `accumulate` is below 1.
    """
    if not examples or accumulate < 1:
        raise ValueError(f"no steps from {len(examples)} examples with accumulate={accumulate}")
    done = 0
    while done < steps:
        epoch = list(batches(examples, batch_size, pad_id=pad_id, generator=generator))
        for start in range(0, len(epoch), accumulate):
            if done == steps:
                return
            yield epoch[start : start + accumulate]
            done += 1


def num_steps(examples: int, train: TrainConfig) -> int:
    """Return the optimizer steps of one client and round: `local_steps`, or those of its epochs."""
    if train.local_steps:
        return train.local_steps
    micro_batches = math.ceil(examples / train.batch_size)
    return train.local_epochs * math.ceil(micro_batches / train.accumulate)


def _collate(examples: Sequence[Example], pad_id: int) -> Batch:
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        mask[row, :length] = 1
        labels[row, :length] = example.labels
    return Batch(input_ids, mask, labels)
