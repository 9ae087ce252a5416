"""Frames as bytes: versioned, and with a checksum, so that a damaged one is known as such."""

from __future__ import annotations

import zlib

from google.protobuf.message import DecodeError

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import WIRE_VERSION


def client_frame(**body: object) -> bytes:
    """A frame to the trunk."""
    return _seal(pb.ClientFrame(version=WIRE_VERSION, **body).SerializeToString())  # type: ignore[arg-type]


def server_frame(**body: object) -> bytes:
    """A frame to a client."""
    return _seal(pb.ServerFrame(version=WIRE_VERSION, **body).SerializeToString())  # type: ignore[arg-type]


def read_client_frame(raw: bytes) -> pb.ClientFrame:
    """Read a client's frame.

    Raises
    ------
    TrunkError
        Of kind `damaged`, if it did not arrive as it was sent; it may be sent again. Of another
        kind, if it did and is no frame of this version.
    """
    frame = pb.ClientFrame()
    _read(frame, raw, "the client")
    if frame.WhichOneof("body") is None:
        raise TrunkError("a frame without a body came")
    return frame


def read_server_frame(raw: bytes) -> pb.ServerFrame:
    """Read the trunk's frame, which may be a failure; see `read_client_frame`."""
    frame = pb.ServerFrame()
    _read(frame, raw, "the trunk")
    return frame


def refuse_failure(frame: pb.ServerFrame) -> pb.ServerFrame:
    """Return a frame that is not a failure; one that is becomes the `TrunkError` it tells of."""
    if frame.WhichOneof("body") == "failure":
        raise TrunkError(frame.failure.message, kind=frame.failure.kind)
    return frame


def failure_of(error: TrunkError, step: int = 0, micro: int = 0) -> pb.Failure:
    """What a client is told of an error."""
    return pb.Failure(kind=error.kind, message=str(error), step=step, micro=micro)


def _read(frame: pb.ClientFrame | pb.ServerFrame, raw: bytes, whose: str) -> None:
    """Fill an empty frame, and refuse another version's."""
    try:
        frame.ParseFromString(_unseal(raw))
    except DecodeError as error:
        raise TrunkError(f"a frame of {len(raw)} bytes is not a Graft frame: {error}") from error
    if frame.version != WIRE_VERSION:
        raise TrunkError(
            f"wire version {frame.version} came from {whose}, version {WIRE_VERSION} is spoken "
            "here; run the same release of Graft on both sides",
            kind="version",
        )


def _seal(body: bytes) -> bytes:
    raw: bytes = pb.Envelope(checksum=zlib.crc32(body), body=body).SerializeToString()
    return raw


def _unseal(raw: bytes) -> bytes:
    try:
        envelope = pb.Envelope.FromString(raw)
        # Nothing at all would fit its checksum, which is 0.
        whole = bool(envelope.body) and zlib.crc32(envelope.body) == envelope.checksum
    except DecodeError:
        whole = False
    if not whole:
        raise TrunkError(
            f"a frame of {len(raw)} bytes did not arrive as it was sent: its checksum does not fit "
            "(or the other side runs another release of Graft)",
            kind="damaged",
        )
    body: bytes = envelope.body
    return body
