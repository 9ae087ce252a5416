"""What a server may say to a client, and the words for all else."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from conf.load import to_json
from conf.schema import Config
from flower_app.client.received import Received, read_message
from flower_app.client_app import app
from strategies.transport.tickets import new_key, new_nonce, public_half

CONFIG = replace(Config(), model=replace(Config().model, path="/m"))
TICKET: dict[str, Any] = {
    "session": "train-1.1-7", "address": "127.0.0.1:9", "nonce": new_nonce(), "seed": 7,
    "trunk_key": public_half(new_key()), "certificate": b"", "model": "m", "round": 1, "rounds": 2,
    "batch-sizes": [2, 0],
}  # fmt: skip


def content(**changes: Any) -> RecordDict:
    """A message with another ticket; None: without that field."""
    told = {name.replace("_sizes", "-sizes"): value for name, value in changes.items()}
    ticket = {name: value for name, value in {**TICKET, **told}.items() if value is not None}
    shared = ConfigRecord({"json": to_json(CONFIG)})
    return RecordDict({"arrays": ArrayRecord(), "config": shared, "ticket": ConfigRecord(ticket)})


def test_a_good_message_is_read() -> None:
    found = read_message(content())

    assert (found.round, found.rounds, found.batch_sizes) == (1, 2, [2, 0])
    assert (found.count_examples, found.send_tensors, found.frames) == (False, False, [])
    assert vars(found.ticket()).items() <= TICKET.items()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"round": None}, "round=None, which must be of type int"),
        ({"round": "1"}, "round='1'"),
        ({"round": True}, "round=True"),
        ({"round": -1}, "round=-1, which must be 0 to rounds=2"),
        ({"round": 3}, "round=3, which must be 0 to rounds=2"),
        ({"rounds": None}, "rounds=None"),
        ({"session": 7}, "session=7"),
        ({"model": b"m"}, "model=b'm'"),
        ({"batch_sizes": [1, -1]}, r"batch-sizes=\[1, -1\], which must be whole numbers"),
        ({"batch_sizes": [1.5]}, r"batch-sizes=\[1.5\]"),
        ({"batch_sizes": 3}, "batch-sizes=3"),
        ({"session": ""}, "session='', which must be the name of a session"),
        ({"address": None}, "address=None"),
        ({"address": "trunk"}, "address='trunk', which must be host:port"),
        ({"nonce": b"short"}, "nonce=b'short', which must be 32 bytes"),
        ({"trunk_key": bytes(32)}, "trunk_key=.*, which must be a public key"),
        ({"certificate": "PEM"}, "certificate='PEM'"),
    ],
)
def test_what_cannot_be_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"the server sends {words}"):
        Received.ticket(read_message(content(**changes)))


@pytest.mark.parametrize("record", ["arrays", "config", "ticket"])
def test_a_broken_message_is_answered_in_words(
    record: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No KeyError, and no traceback: it is not this client that is wrong."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    sent = content()
    del sent[record]

    reply = app(Message(sent, 1, "train"), Context(1, 1, {"name": "a"}, RecordDict(), {}))

    error = reply.content.config_records["outcome"]["error"]
    assert f"not one of Graft's: it has no record '{record}'" in str(error)
    assert not [entry for entry in caplog.records if entry.levelno >= logging.ERROR]
