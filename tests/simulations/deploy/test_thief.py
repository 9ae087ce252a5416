"""A thief reads tickets out of a SuperLink's database: what Flower stores, as Flower stores it."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from conf.schema import TrainConfig
from models import split
from simulations.deploy.thief import steal_ticket, try_ticket
from strategies.records import ARRAYS, CONFIG, TICKET
from strategies.transport.stream.link import GrpcLink
from strategies.transport.tickets import new_key
from tests.strategies.helpers import (
    CUT,
    NODE_KEY,
    admit,
    engine_for,
    link_config,
    served,
    tiny_model,
)

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


@pytest.mark.parametrize("tls", ["off", "on"])
def test_a_stolen_ticket_opens_nothing_and_its_client_notices_nothing(tls: str) -> None:
    engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig())
    engine.open_round(1, 1, training=True)
    with served(engine, tls=tls) as service:
        ticket = admit(service, "one")
        stolen = ticket.as_record()
        assert "no session is open to this token" in try_ticket(stolen, new_key())
        link = GrpcLink(ticket, NODE_KEY, steps=1, config=link_config())
        assert "no session is open to this token" in try_ticket(stolen, new_key())
        assert "it was used before" in try_ticket(stolen, NODE_KEY)  # the client's own token
        link.close()
        other = admit(service, "two").as_record()
        with pytest.raises(RuntimeError, match="ticket of session 'two' was not refused"):
            try_ticket(other, NODE_KEY)  # nothing but the node's key was lacking
    with pytest.raises(RuntimeError, match="no trunk refused the stolen ticket"):
        try_ticket(stolen, new_key())
