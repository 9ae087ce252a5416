"""Each client's batches, which all methods of the comparison share."""

from __future__ import annotations

from collections.abc import Iterator

from conf.schema import Config
from flower_app.client.place import Place
from flower_app.client.plan import Plan
from flower_app.data.client import Batch, ClientData, batches, load_client_data, load_tokenizer


def client_data(config: Config, client: int) -> ClientData:
    """The examples of one client, as Graft's ClientApp divides them."""
    return load_client_data(
        config.data,
        load_tokenizer(config.model),
        partition=client,
        partitions=config.federation.min_clients,
        seed=config.seed,
    )


def client_steps(config: Config, client: int, number: int) -> list[list[Batch]]:
    """One client's micro-batches of each step of round `number`, in the order of Graft's."""
    place = Place(
        seed=config.seed, client=f"client-{client}", round=number, rounds=config.train.rounds
    )
    return list(Plan(client_data(config, client).train, config, place, pad_id=0))


def heldout(config: Config, client: int) -> list[Batch]:
    """One client's held-out batches."""
    return list(batches(client_data(config, client).heldout, config.train.batch_size, pad_id=0))


def all_heldout(config: Config) -> Iterator[Batch]:
    """Those of all clients."""
    for client in range(config.federation.min_clients):
        yield from heldout(config, client)
