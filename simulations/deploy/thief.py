"""A thief of tickets, who reads along in the SuperLink's database.

Flower keeps a message there in the clear until its SuperNode has fetched and confirmed it. So
whoever gets at the file, or at a backup of it, sees what Graft sends to its clients. What it gives
them with a ticket must therefore open nothing.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "ticket"
"""Name of the record in a train or evaluate message by which a client opens its session."""
ADDRESS = "address"
"""What a ticket names if a session goes with it: where the trunk listens."""

ANSWER_SECONDS = 10.0
"""How long the trunk may take to refuse a thief."""


def steal_ticket(database: Path, *, seconds: float = 300.0) -> dict[str, Any]:
    """Wait for a session's ticket to pass through a SuperLink, and copy it.

    Parameters
    ----------
    database : Path
        The SuperLink's `--database`.
    seconds : float
        How long to wait.

    Returns
    -------
    dict
        The ticket's entries.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # Nothing to read yet: no database, no tables, or Flower writes just now.
        with contextlib.suppress(sqlite3.Error):
            for ticket in read_tickets(database):
                if ticket.get(ADDRESS):
                    return ticket
        time.sleep(0.1)
    raise RuntimeError(f"waited {seconds:.0f} s for a ticket in {database}; none came by")


def try_ticket(stolen: Mapping[str, Any], key: bytes) -> str:
    """Knock at the trunk with a stolen ticket.

    Parameters
    ----------
    stolen : mapping
        The ticket's entries.
    key : bytes
        A private key of the thief's; the node's own is what it lacks.

    Returns
    -------
    str
        The trunk's refusal. A RuntimeError is raised if the thief gets in, or not so far.
    """
    from strategies.errors import TrunkError
    from strategies.transport import tickets
    from strategies.transport.stream.channel import Stream

    ticket = tickets.Ticket.from_record(stolen)
    secret = tickets.session_secret(key, ticket.trunk_key, ticket.nonce, ticket.session)
    stream = Stream(ticket, secret, number=1, steps=1, limit=2**20, grace=ANSWER_SECONDS)
    try:
        answer = stream.receive(ANSWER_SECONDS)
    except TrunkError as error:
        if error.kind != "refused":
            raise RuntimeError(f"no trunk refused the stolen ticket: {error}") from error
        return str(error)
    finally:
        stream.drop()
    raise RuntimeError(
        f"the stolen ticket of session '{ticket.session}' was not refused: "
        + ("no answer" if answer is None else f"the trunk answered with {len(answer)} bytes")
    )


def read_tickets(database: Path) -> list[dict[str, Any]]:
    """Return the tickets of all messages that a SuperLink holds at this moment.

    Parameters
    ----------
    database : Path
        The SuperLink's `--database`.

    Returns
    -------
    list of dict
        Their entries.
    """
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT object_id, content FROM objects WHERE is_available = 1")
        return tickets_among(dict(rows))


def tickets_among(objects: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return the tickets among Flower's stored objects.

    Parameters
    ----------
    objects : mapping
        From an object's id to its content. A message's records are objects of their own, to which
        its RecordDict refers by name.

    Returns
    -------
    list of dict
        The entries of each ticket whose record and RecordDict are both there.
    """
    from flwr.app import ConfigRecord, RecordDict
    from flwr.supercore.inflatable.inflatable_object import (
        get_object_body,
        get_object_type_from_object_content,
    )

    found = []
    for content in objects.values():
        if get_object_type_from_object_content(content) != RecordDict.__qualname__:
            continue
        names = json.loads(get_object_body(content, RecordDict))
        record = objects.get(names.get(RECORD, ""))
        if record is not None:
            found.append(dict(ConfigRecord.inflate(record)))
    return found
