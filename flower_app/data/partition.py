"""Which client gets which documents: flwr-datasets' partitioners, and their refusals in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from datasets import Dataset
from flwr_datasets import partitioner as flower

from conf.schema import DataConfig
from flower_app.data.refusals import DataError, quiet
from flower_app.data.rows import Rows

_CLIENT, _ROW = "__client__", "__row__"


def take_partition(
    rows: Rows, config: DataConfig, *, partition: int, partitions: int, seed: int
) -> Rows:
    """Return the rows of one client; over all clients, every row comes exactly once.

    Parameters
    ----------
    partition, partitions : int
        The client's number, from 0, and how many there are, as Flower's node config gives them.
    seed : int
        The run's seed, the same at every client: it decides who gets what.

    Raises
    ------
    DataError
        If the rows cannot be divided among so many clients as configured.
    """
    if not 0 <= partition < partitions:
        raise DataError(f"partition {partition} is not in 0..{partitions - 1}")
    if partitions > len(rows):
        raise DataError(f"{len(rows)} documents cannot be divided among {partitions} clients")
    with quiet():
        keys = _keys(rows, config)
        return rows.select(_divided(keys, config, partition, partitions, seed)[_ROW])


def _keys(rows: Rows, config: DataConfig) -> Dataset:
    """Return what decides who gets a row: its number and, where it counts, its value."""
    keys: dict[str, list[int] | list[str]] = {_ROW: list(range(len(rows)))}
    if config.partitioner in ("natural", "dirichlet"):
        by = config.partition_by or "topic"
        values = rows[by]
        if any(value is None for value in values):
            raise DataError(
                f"data.partitioner={config.partitioner}: column {by!r} has rows without a value"
            )
        keys[by] = [str(value) for value in values]
    return Dataset.from_dict(keys)


def _divided(
    rows: Dataset, config: DataConfig, partition: int, partitions: int, seed: int
) -> Dataset:
    shuffled = rows.shuffle(seed=seed)
    by = config.partition_by or "topic"
    if config.partitioner == "natural":
        shuffled = _deal_values(shuffled, by, partitions, seed)
    try:
        with warnings.catch_warnings():
            # flwr-datasets warns at every attempt of dirichlet and then raises.
            warnings.simplefilter("ignore")
            maker = _partitioner(config, by, partitions, seed)
            maker.dataset = shuffled
            return maker.load_partition(partition)
    except ValueError:
        raise DataError(
            f"data.partitioner={config.partitioner} cannot divide {len(rows)} documents among "
            f"{partitions} clients: take fewer clients, more data, a larger data.alpha, or "
            "data.partitioner=iid"
        ) from None


def _partitioner(config: DataConfig, by: str, partitions: int, seed: int) -> flower.Partitioner:
    by_size: dict[str, Callable[..., flower.Partitioner]] = {
        "iid": flower.IidPartitioner,
        "linear": flower.LinearPartitioner,
        "square": flower.SquarePartitioner,
        "exponential": flower.ExponentialPartitioner,
    }
    if config.partitioner == "natural":
        return flower.GroupedNaturalIdPartitioner(_CLIENT, group_size=1, sort_unique_ids=True)
    if config.partitioner == "dirichlet":
        return flower.DirichletPartitioner(
            partitions, by, alpha=config.alpha, min_partition_size=1, seed=seed
        )
    return by_size[config.partitioner](num_partitions=partitions)


def _deal_values(rows: Dataset, by: str, partitions: int, seed: int) -> Dataset:
    """Add the column of the client that owns each value of `by`.

    There are more topics than clients, and flwr-datasets' own grouping fixes the size of the
    groups, not their number.
    """
    column = rows[:][by]  # a list; `rows[by]` would be decoded value by value
    values = sorted(set(column))
    if len(values) < partitions:
        raise DataError(
            f"data.partitioner=natural: column {by!r} has {len(values)} values, "
            f"too few for {partitions} clients"
        )
    order = np.random.default_rng(seed).permutation(len(values))
    owner = {values[value]: place % partitions for place, value in enumerate(order)}
    return rows.add_column(_CLIENT, [owner[value] for value in column])  # type: ignore[call-arg]
