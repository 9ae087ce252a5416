"""A thief reads tickets out of a SuperLink's database: what Flower stores, as Flower stores it."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from simulations.thief import steal_ticket
from strategies.answers import ARRAYS, CONFIG, TICKET

SECRETS = {"address": "10.0.0.1:9393", "token": "secret", "round": 1}


def _store(database: Path, ticket: dict[str, str | int]) -> None:
    content = RecordDict(
        {
            ARRAYS: ArrayRecord(),
            CONFIG: ConfigRecord({"json": "{}"}),
            TICKET: ConfigRecord(ticket),
        }
    )
    store = SqlObjectStore(str(database))
    store.initialize()
    store.preregister(1, get_object_tree(content))
    for object_id, each in get_all_nested_objects(content).items():
        store.put(object_id, each.deflate())


def test_finds_the_ticket_of_a_session(tmp_path: Path) -> None:
    database = tmp_path / "state.db"
    _store(database, {"round": 0})  # the message that asks a client for its profile
    _store(database, SECRETS)
    assert steal_ticket(database, seconds=1) == SECRETS


def test_waits_in_vain_where_nothing_passes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="waited 0 s for a ticket in .*state.db"):
        steal_ticket(tmp_path / "state.db", seconds=0.3)
    _store(tmp_path / "state.db", {"round": 0})
    with pytest.raises(RuntimeError, match="none came by"):
        steal_ticket(tmp_path / "state.db", seconds=0.3)
