"""Tensors on the wire: self-describing, bounded before they are read, never pickled.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.payload import Parcel, Payload

MAX_DIMENSIONS = 4

NAMED = "fp32"
"""How weights and their gradients travel: they are not rounded on the way."""


def shape_of(message: pb.Tensor, what: str) -> tuple[int, ...]:
    """The shape a message claims; `TrunkError` if its dimensions are too many, none, or zero."""
    if not 1 <= len(message.shape) <= MAX_DIMENSIONS:
        raise TrunkError(f"{what}: {len(message.shape)} dimensions are not accepted", kind="shape")
    shape = tuple(message.shape)
    if 0 in shape:
        raise TrunkError(f"{what}: shape {shape} is not accepted", kind="shape")
    return shape


def as_bytes(tensor: Tensor) -> memoryview:
    """The elements of a contiguous tensor on the CPU, little-endian and row by row; not copied."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")


def from_bytes(data: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The one copy of elements that came; `ValueError` if the shape has another number of them."""
    if (expected := math.prod(shape) * dtype.itemsize) != len(data):
        raise ValueError(f"shape {shape} takes {expected} bytes, {len(data)} came")
    tensor = torch.empty(shape, dtype=dtype)
    as_bytes(tensor)[:] = data
    return tensor


def encode_mask(mask_BT: Tensor | None) -> bytes:
    """A bit for each position, 0 where there is padding; nothing if there is none."""
    if mask_BT is None:
        return b""
    return np.packbits(mask_BT.detach().to("cpu", torch.bool).numpy().reshape(-1)).tobytes()


def decode_mask(data: bytes, shape: tuple[int, ...]) -> Tensor | None:
    """Rebuild a mask (B, T), bool; None if nothing is padding.

    Raises
    ------
    TrunkError
        If the bits are not one for each position, or all positions are padding.
    """
    if not data:
        return None
    positions = math.prod(shape)
    if (expected := (positions + 7) // 8) != len(data):
        raise TrunkError(
            f"mask: shape {shape} takes {expected} bytes, {len(data)} came", kind="shape"
        )
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=positions)
    if not bits.any():
        raise TrunkError("mask: all positions are padding", kind="shape")
    return torch.from_numpy(bits).bool().reshape(shape)


def encode_named(
    tensors: Mapping[str, Tensor],
    parcel: Parcel,
    rows: Mapping[str, Tensor] | None = None,
) -> list[pb.NamedTensor]:
    """Describe named tensors, in fp32; `rows` says which of their rows some of them are (int64)."""
    return [
        pb.NamedTensor(
            name=name,
            tensor=parcel.put(
                tensor.shape, NAMED, as_bytes(tensor.detach().to("cpu", torch.float32).contiguous())
            ),
            rows=rows[name].tolist() if rows and name in rows else (),
        )
        for name, tensor in tensors.items()
    ]


def decode_named(messages: Iterable[pb.NamedTensor], payload: Payload) -> dict[str, Tensor]:
    """Rebuild `encode_named`; a scalar or an empty tensor is refused like any odd shape."""
    return {each.name: _decode_one(each, payload) for each in messages}


def _decode_one(message: pb.NamedTensor, payload: Payload) -> Tensor:
    what, tensor = f"'{message.name}'", message.tensor
    shape = shape_of(tensor, what)
    if tensor.codec != NAMED:
        raise TrunkError(f"{what} came as {tensor.codec[:40]!r}, not as {NAMED}", kind="codec")
    try:
        return from_bytes(payload.of(tensor, what), shape, torch.float32)
    except ValueError as error:
        raise TrunkError(f"{what}: {error}", kind="shape") from None
