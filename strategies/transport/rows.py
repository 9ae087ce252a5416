"""Some rows of a batch on the wire, by name and by bit.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.codec import Codec
from strategies.transport.payload import Parcel, Payload

NAME = 16
"""Bytes of an example's name."""


def encode_rows(
    codec: Codec, tensor_BTD: Tensor, sent_BT: Tensor, place: tuple[int, int], parcel: Parcel
) -> pb.Tensor:
    """As `Codec.encode`; without data where nothing is to be sent."""
    if not sent_BT.any():
        return parcel.put(tensor_BTD.shape, codec.name, b"")
    return codec.encode(tensor_BTD, sent_BT, *place, parcel)


def decode_rows(
    codec: Codec, message: pb.Tensor, sent_BT: Tensor, payload: Payload, what: str
) -> Tensor:
    """As `Codec.decode`, in fp32."""
    if not sent_BT.any():
        if message.size:
            raise TrunkError(f"{what}: {message.size} bytes came of no row", kind="shape")
        return torch.zeros(tuple(message.shape))
    return codec.decode(message, sent_BT, payload, what).float()


def tokens_of(mask_BT: Tensor | None, B: int, T: int) -> Tensor:
    """Where there is no padding (B, T), on the CPU."""
    return torch.ones(B, T, dtype=torch.bool) if mask_BT is None else mask_BT.bool().cpu()


def names_of(data: bytes, B: int) -> list[bytes]:
    """A name for each of so many rows."""
    if len(data) != B * NAME:
        raise TrunkError(
            f"{len(data)} bytes of names came with {B} rows, which take {B * NAME}", kind="shape"
        )
    return split_names(data)


def split_names(names: bytes) -> list[bytes]:
    """Names that lie one after another."""
    return [names[at : at + NAME] for at in range(0, len(names), NAME)]


def first_of_each(names: Sequence[bytes]) -> list[int]:
    """Where each name comes first: a row that comes twice in a batch is kept once."""
    return list({name: row for row, name in reversed(list(enumerate(names)))}.values())


def to_bits(flags: Sequence[bool]) -> bytes:
    """A bit for each row; nothing if none is set."""
    return np.packbits(np.array(flags, bool)).tobytes() if any(flags) else b""


def from_bits(data: bytes, B: int) -> Tensor:
    """As `to_bits` wrote them, bool (B,); `TrunkError` if they are not one for each row."""
    if not data:
        return torch.zeros(B, dtype=torch.bool)
    if len(data) != (B + 7) // 8:
        raise TrunkError(f"{len(data)} bytes of bits came for {B} rows", kind="shape")
    return torch.from_numpy(np.unpackbits(np.frombuffer(data, np.uint8), count=B)).bool()
