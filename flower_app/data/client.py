"""What a client trains on: its examples, held-out ones apart, and the batches made of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from conf.schema import DataConfig
from flower_app.data.batches import Batch, batches, num_steps, steps
from flower_app.data.examples import IGNORED, Example, cut
from flower_app.data.formats import layout_of
from flower_app.data.partition import take_partition
from flower_app.data.refusals import DataError, reason
from flower_app.data.rows import Rows
from flower_app.data.sources import load_rows
from flower_app.data.text import encode
from flower_app.data.tokenizer import load_tokenizer

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
    documents, skipped = _encode_all(rows, config, tokenizer, name)
    if not documents:
        column = list(layout_of(config, tuple(rows.column_names)).columns.values())[-1]
        raise DataError(
            f"{name} has no example: {len(rows)} documents, {skipped} of them empty in column "
            f"{column!r} or without anything to learn in data.context={config.context} tokens"
        )
    if skipped:
        logger.warning("%s: %d documents skipped, nothing to learn in them", name, skipped)
    train, heldout = split_heldout(documents, config.heldout, seed=seed, partition=partition)
    return ClientData(name, train, heldout, len(documents), skipped)


def _encode_all(
    rows: Rows, config: DataConfig, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[list[list[Example]], int]:
    """Return the examples of each document that has any, and how many have none."""
    documents: list[list[Example]] = []
    notes: set[str] = set()
    skipped = examples = 0
    for index, row in enumerate(rows):
        which = f"document {index} of {name} ({rows.place(index)})"
        try:
            encoded = encode(row, config, tokenizer)
        except DataError as error:
            raise DataError(f"{which}: {error}") from None
        found = cut(encoded, config, which) if encoded else []
        notes |= encoded.notes if encoded else set()
        if config.max_examples:
            found = found[: config.max_examples - examples]
        documents.extend([found] if found else [])
        skipped += not found
        examples += len(found)
        if examples == config.max_examples > 0:
            break
    for note in sorted(notes):
        logger.warning("%s: %s", name, note)
    return documents, skipped


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
