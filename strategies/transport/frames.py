"""Frames as bytes: versioned, and with a checksum, so that a damaged one is known as such.

`trunk.proto` says how they lie on the wire.
"""

from __future__ import annotations

import struct
from typing import Generic, NamedTuple, TypeVar

import xxhash
from google.protobuf.message import DecodeError

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.payload import Parcel, Payload

WIRE_VERSION = 4
"""Raised when a frame's meaning changes; both sides must agree."""

MAX_HEAD = 2**22
"""Most bytes of a head: what it says of itself may take 32 times as much memory once it is read. A
vocabulary's row numbers take 3 bytes each, a tensor's name and shape about 100."""

Head = TypeVar("Head", pb.ClientFrame, pb.ServerFrame)

_CHECKSUM, _LENGTH = struct.Struct("<Q"), struct.Struct("<I")
_BEGINNING = _CHECKSUM.size + _LENGTH.size
"""Bytes before the head."""


class Frame(NamedTuple, Generic[Head]):
    """A frame that came whole: its head, and the data of the tensors that the head tells of."""

    head: Head
    payload: Payload

    @property
    def kind(self) -> str:
        """What it is: the name of the body."""
        return self.head.WhichOneof("body") or ""


def client_frame(parcel: Parcel | None = None, *, number: int = 0, **body: object) -> bytes:
    """A frame to the trunk, with the data of its tensors."""
    head = pb.ClientFrame(version=WIRE_VERSION, number=number, **body)  # type: ignore[arg-type]
    return _sealed(head.SerializeToString(), parcel)


def server_frame(parcel: Parcel | None = None, *, number: int = 0, **body: object) -> bytes:
    """A frame to a client, with the data of its tensors."""
    head = pb.ServerFrame(version=WIRE_VERSION, number=number, **body)  # type: ignore[arg-type]
    return _sealed(head.SerializeToString(), parcel)


def read_client_frame(raw: bytes) -> Frame[pb.ClientFrame]:
    """Read a client's frame; what its head says of tensors is checked where they are decoded.

    Raises
    ------
    TrunkError
        Of kind `damaged`, if it did not arrive as it was sent; it may be sent again. Of another
        kind, if it did and is no frame of this version.
    """
    frame = _read(pb.ClientFrame(), raw, "the client")
    if not frame.kind:
        raise TrunkError("a frame without a body came")
    return frame


def read_server_frame(raw: bytes) -> Frame[pb.ServerFrame]:
    """Read the trunk's frame, which may be a failure; see `read_client_frame`."""
    return _read(pb.ServerFrame(), raw, "the trunk")


def refuse_failure(frame: Frame[pb.ServerFrame]) -> Frame[pb.ServerFrame]:
    """Return a frame that is not a failure; one that is becomes the `TrunkError` it tells of."""
    if frame.kind == "failure":
        raise TrunkError(frame.head.failure.message, kind=frame.head.failure.kind)
    return frame


def failure_of(error: TrunkError, step: int = 0, micro: int = 0) -> pb.Failure:
    """What a client is told of an error."""
    return pb.Failure(kind=error.kind, message=str(error), step=step, micro=micro)


def checksum_of(raw: bytes) -> bytes:
    """The checksum that a frame which came whole begins with."""
    return raw[: _CHECKSUM.size]


def _read(head: Head, raw: bytes, whose: str) -> Frame[Head]:
    """Fill an empty head, and refuse another version's."""
    length = _checked(raw)
    if length > MAX_HEAD:
        raise TrunkError(
            f"a frame's head of {length} bytes came from {whose}, {MAX_HEAD} are accepted: fewer "
            "tensors, rows or positions at once",
            kind="shape",
        )
    payload = memoryview(raw)[_BEGINNING + length :]
    try:
        head.ParseFromString(memoryview(raw)[_BEGINNING : _BEGINNING + length])  # type: ignore[arg-type]
    except DecodeError as error:
        raise TrunkError(f"a frame of {len(raw)} bytes is not a Graft frame: {error}") from error
    if head.version != WIRE_VERSION:
        raise TrunkError(
            f"wire version {head.version} came from {whose}, version {WIRE_VERSION} is spoken "
            "here; run the same release of Graft on both sides",
            kind="version",
        )
    return Frame(head, Payload(payload))


def _sealed(head: bytes, parcel: Parcel | None) -> bytes:
    """Join a frame's pieces: the one copy of its payload on this side."""
    pieces = [_LENGTH.pack(len(head)), head, *(parcel.parts if parcel else ())]
    checksum = xxhash.xxh3_64()
    for piece in pieces:
        checksum.update(piece)
    return b"".join((_CHECKSUM.pack(checksum.intdigest()), *pieces))


def _checked(raw: bytes) -> int:
    """The length of the head of a frame that arrived whole; `TrunkError` of one that did not."""
    if len(raw) > _BEGINNING:
        (checksum,), (length,) = (
            _CHECKSUM.unpack_from(raw),
            _LENGTH.unpack_from(raw, _CHECKSUM.size),
        )
        whole = xxhash.xxh3_64_intdigest(memoryview(raw)[_CHECKSUM.size :]) == checksum
        if whole and 0 < length <= len(raw) - _BEGINNING:
            return length
    raise TrunkError(
        f"a frame of {len(raw)} bytes did not arrive as it was sent: its checksum does not fit "
        "(or the other side runs another release of Graft)",
        kind="damaged",
    )
