"""Tensors on the wire: self-describing, bounded before they are read, never pickled.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

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
    tensors: Mapping[str, Tensor], parcel: Parcel, since: Mapping[str, Tensor] | None = None
) -> list[pb.NamedTensor]:
    """Describe named tensors, in fp32.

    Parameters
    ----------
    tensors : mapping
        By name in the whole model.
    parcel : Parcel
        Takes their data.
    since : mapping, optional
        What the other side has of all of them: then only those are described that differ, and of
        matrices in which fewer than half of the rows do, those rows. An embedding has a gradient
        in the rows of the tokens that occurred, and no others.
    """
    if since is None:
        return [_named(name, tensor, None, parcel) for name, tensor in tensors.items()]
    found = []
    for name, tensor in tensors.items():
        differs = tensor != since[name]
        if not bool(differs.any()):
            continue
        rows = differs.flatten(1).any(1).nonzero()[:, 0] if tensor.dim() > 1 else None
        if rows is not None and 2 * len(rows) < len(tensor):
            found.append(_named(name, tensor[rows], rows, parcel))
        else:
            found.append(_named(name, tensor, None, parcel))
    return found


def _named(name: str, tensor: Tensor, rows: Tensor | None, parcel: Parcel) -> pb.NamedTensor:
    data = as_bytes(tensor.detach().to("cpu", torch.float32).contiguous())
    numbers = () if rows is None else rows.tolist()
    return pb.NamedTensor(name=name, tensor=parcel.put(tensor.shape, NAMED, data), rows=numbers)


def check_named(messages: Sequence[pb.NamedTensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse tensors, before any is read, that are none of these, or not of their shapes.

    Raises
    ------
    TrunkError
        For a name that is not there or comes twice, another shape, or rows that cannot be.
    """
    if len(messages) > len(shapes):  # counted before any is looked at
        raise TrunkError(
            f"{len(messages)} named tensors came, there are {len(shapes)}", kind="shape"
        )
    if len({each.name for each in messages}) != len(messages):
        # One that hides behind another of its name would be read unchecked.
        raise TrunkError("a name comes twice among the named tensors", kind="shape")
    for each in messages:
        what, claimed = f"'{each.name[:80]}'", shape_of(each.tensor, f"'{each.name[:80]}'")
        if each.name not in shapes:
            raise TrunkError(f"{what} is none of the ends' common tensors", kind="shape")
        whole, count = tuple(shapes[each.name]), len(each.rows)
        wanted = (count, *whole[1:]) if count else whole
        # Row numbers are read once they are known to be no more than there are rows.
        if claimed != wanted or (count and not (whole and _in_order(each.rows, whole[0]))):
            raise TrunkError(
                f"{what} came with shape {claimed} and {count} row numbers; it has {whole}",
                kind="shape",
            )


def _in_order(rows: Sequence[int], count: int) -> bool:
    """Whether these are some of so many rows, each once."""
    if len(rows) > count:
        return False
    numbers = np.asarray(rows, dtype=np.int64)
    return bool((np.diff(numbers) > 0).all() and numbers[-1] < count)


def decode_changed(
    messages: Iterable[pb.NamedTensor], payload: Payload, since: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What `encode_named` made beside the same `since`: those that differ, whole, in fp32."""
    found = {}
    for each in messages:
        tensor = _decode_one(each, payload)
        if each.rows:
            whole = since[each.name].float().clone()
            whole[torch.tensor(each.rows[:])] = tensor.to(whole.device)
            tensor = whole
        found[each.name] = tensor
    return found


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
