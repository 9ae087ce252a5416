"""The one place where what the server sends is checked, before a client acts on it.

Frames and tensors have readers of their own: `transport.frames` and `records.read_arrays`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from flwr.app import ArrayRecord, RecordDict

from conf.load import from_json
from conf.rules import split_address
from conf.schema import Config
from strategies.aggregate.masked import MOST_TOKENS
from strategies.records import ARRAYS, CONFIG, FRAMES, TICKET
from strategies.transport.tickets import KEY_BYTES, Ticket, is_usable

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Received:
    """What one message asks of this client."""

    config: Config
    """The run's, as the server has it."""
    arrays: ArrayRecord
    round: int
    rounds: int
    session: str
    """Name of the session; empty: the message opens none."""
    model: str
    """What the trunk was cut from, in words; empty if the message needs no model."""
    batch_sizes: list[int]
    """Examples of each step as the server drew them; empty without `train.global_batch`."""
    count_examples: bool
    send_tensors: bool
    export: bool
    """Whether this site is to save what stays with it, for the run is over."""
    run: str
    """What this site's own ends are kept under; empty if none stay here."""
    ends_round: int
    """The round whose ends of this site's own count; 0: those it starts from."""
    ends_best: int
    """The same, as of the best round so far: they may be wanted again."""
    masks: list[bytes]
    """Of the masks in the sum of ends that came, with `privacy.ends=masked`."""
    masks_weight: int
    """What that sum is to be divided by."""
    masks_check: bytes
    """Of the site key that made the masks."""
    frames: list[bytes]
    told: Mapping[str, Any]
    """The ticket, as it came."""

    @property
    def codec_seed(self) -> int:
        """What the session's codecs draw from."""
        return _take(self.told, "seed", int)

    def ticket(self) -> Ticket:
        """What a session over the stream is opened with.

        Raises
        ------
        ValueError
            If it opens none.
        """
        found = Ticket(
            session=self.session,
            address=_take(self.told, "address", str),
            nonce=_take(self.told, "nonce", bytes),
            trunk_key=_take(self.told, "trunk_key", bytes),
            seed=self.codec_seed,
            certificate=_take(self.told, "certificate", bytes),
        )
        try:
            split_address(found.address)
        except ValueError as error:
            raise _odd("address", found.address, "host:port") from error
        if not found.session:
            raise _odd("session", found.session, "the name of a session")
        if len(found.nonce) != KEY_BYTES:
            raise _odd("nonce", found.nonce, f"{KEY_BYTES} bytes")
        if not is_usable(found.trunk_key):
            raise _odd("trunk_key", found.trunk_key, "a public key")
        return found


def read_message(content: RecordDict) -> Received:
    """Read what the server sent.

    Raises
    ------
    ValueError
        In words, if something is missing, or of another type or range than it can be.
    """
    told: Mapping[str, Any] = _record(content.config_records, TICKET)
    shared: Mapping[str, Any] = _record(content.config_records, CONFIG)
    number, rounds = _take(told, "round", int), _take(told, "rounds", int)
    if not 0 <= number <= rounds:
        raise _odd("round", number, f"0 to rounds={rounds}")
    sizes = told.get("batch-sizes", [])
    if not isinstance(sizes, list) or not all(_is(size, int) and size >= 0 for size in sizes):
        raise _odd("batch-sizes", sizes, "whole numbers, none below 0")
    run = _take(told, "run", str, "")
    if not re.fullmatch("([0-9a-f]{32})?", run):  # it names a folder
        raise _odd("run", run, "32 hexadecimal digits")
    masks, weight = told.get("masks", []), _take(told, "masks-weight", int, 0)
    if not isinstance(masks, list) or not all(_is(mask, bytes) for mask in masks):
        raise _odd("masks", masks, "a list of bytes")
    if len({*masks}) < len(masks) or not len(masks) <= weight < MOST_TOKENS:
        raise _odd("masks-weight", weight, f"a token for each of {len(masks)} masks that differ")
    frames: Mapping[str, Any] = content.config_records.get(FRAMES, {"frames": []})
    raw = frames.get("frames")
    if not isinstance(raw, list) or not all(isinstance(frame, bytes) for frame in raw):
        raise _odd("frames", raw, "a list of bytes")
    return Received(
        config=from_json(_take(shared, "json", str)),
        arrays=_record(content.array_records, ARRAYS),
        round=number,
        rounds=rounds,
        session=_take(told, "session", str, ""),
        model=_take(told, "model", str, ""),
        batch_sizes=sizes,
        count_examples=_take(told, "count-examples", bool, False),
        send_tensors=_take(told, "send-tensors", bool, False),
        export=_take(told, "export", bool, False),
        run=run,
        ends_round=_take(told, "ends-round", int, 0),
        ends_best=_take(told, "ends-best", int, 0),
        masks=masks,
        masks_weight=weight,
        masks_check=_take(told, "masks-check", bytes, b""),
        frames=raw,
        told=told,
    )


def _record(records: Mapping[str, Any], name: str) -> Any:
    if name not in records:
        raise ValueError(
            f"the server's message is not one of Graft's: it has no record '{name}'; run the same "
            "release of Graft there and here"
        )
    return records[name]


def _take(record: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    value = record.get(name, default)
    if not _is(value, kind):
        raise _odd(name, value, f"of type {kind.__name__}")
    return value


def _is(value: object, kind: type[T]) -> TypeGuard[T]:
    """As `isinstance`, but a bool is no number."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _odd(name: str, value: object, wanted: str) -> ValueError:
    return ValueError(f"the server sends {name}={value!r:.80}, which must be {wanted}")
