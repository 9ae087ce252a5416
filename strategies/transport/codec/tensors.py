"""Tensors on the wire: self-describing, bounded before they are read, never pickled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb

WIRE_VERSION = 3
"""Raised when a frame's meaning changes; both sides must agree."""

MAX_DIMENSIONS = 4

_DTYPES: dict[pb.DType, torch.dtype] = {
    pb.FLOAT32: torch.float32,
    pb.FLOAT16: torch.float16,
    pb.BFLOAT16: torch.bfloat16,
    pb.BOOL: torch.bool,
}
_WIRE = {dtype: wire for wire, dtype in _DTYPES.items()}
_CODECS = {
    pb.FLOAT32: (pb.RAW,),
    pb.FLOAT16: (pb.RAW, pb.SCALED),
    pb.BFLOAT16: (pb.RAW,),
    pb.BOOL: (pb.BITS,),
}


def encode(tensor: Tensor, dtype: torch.dtype) -> pb.Tensor:
    """Describe a floating-point tensor in `dtype`.

    fp16 travels with a power-of-two scale, because gradients are often below its smallest normal
    number (6e-5); scaling by a power of two loses nothing else.
    """
    tensor = tensor.detach()
    scale, codec = 1.0, pb.RAW
    if dtype == torch.float16:
        tensor, scale = _into_fp16_range(tensor)
        codec = pb.SCALED
    tensor = tensor.to("cpu", dtype).contiguous()
    return pb.Tensor(
        version=WIRE_VERSION,
        dtype=_WIRE[dtype],
        shape=tensor.shape,
        codec=codec,
        scale=scale,
        data=tensor.view(torch.uint8).numpy().tobytes(),
    )


def encode_mask(mask_BT: Tensor) -> pb.Tensor:
    """Describe a 0/1 mask, one bit an element."""
    bits = np.packbits(mask_BT.detach().to("cpu", torch.bool).numpy().reshape(-1))
    return pb.Tensor(
        version=WIRE_VERSION,
        dtype=pb.BOOL,
        shape=mask_BT.shape,
        codec=pb.BITS,
        scale=1.0,
        data=bits.tobytes(),
    )


def decode(message: pb.Tensor, what: str, agreed: torch.dtype | None = None) -> Tensor:
    """Rebuild a tensor, after checking that the message is what it says.

    Parameters
    ----------
    message : pb.Tensor
        As received; nothing in it is trusted.
    what : str
        Its name in an error ("activations").
    agreed : torch.dtype, optional
        The only dtype that is accepted.

    Returns
    -------
    Tensor
        Own memory, of the wire's dtype (fp32 for scaled fp16); a mask is bool.

    Raises
    ------
    TrunkError
        For another version, an unknown dtype or codec, or a shape that does not fit the data.
    """
    check_version(message, what)
    dtype = _DTYPES.get(message.dtype)
    if dtype is None or message.codec not in _CODECS[message.dtype] or message.codec_name:
        raise TrunkError(
            f"{what}: dtype {message.dtype} with codec {message.codec} "
            f"{message.codec_name[:40]!r} is not known here",
            kind="codec",
        )
    if agreed is not None and dtype != agreed:
        raise TrunkError(
            f"{what} came in {dtype}, {agreed} was agreed; start both sides with the same "
            "link.dtype",
            kind="codec",
        )
    shape = shape_of(message, what)
    elements = math.prod(shape)
    expected = (elements + 7) // 8 if message.codec == pb.BITS else elements * dtype.itemsize
    if expected != len(message.data):
        raise TrunkError(
            f"{what}: shape {shape} in {dtype} takes {expected} bytes, {len(message.data)} came",
            kind="shape",
        )
    if message.codec == pb.BITS:
        bits = np.unpackbits(np.frombuffer(message.data, np.uint8), count=elements)
        return torch.from_numpy(bits).bool().reshape(shape)
    tensor = torch.frombuffer(bytearray(message.data), dtype=dtype).reshape(shape)
    if message.codec != pb.SCALED:
        return tensor
    if not (math.isfinite(message.scale) and message.scale > 0):
        raise TrunkError(f"{what}: scale {message.scale} is not a positive number", kind="codec")
    return tensor.float() * message.scale


def encode_named(tensors: Mapping[str, Tensor]) -> list[pb.NamedTensor]:
    """Describe named tensors, in fp32: weights and their gradients are not rounded on the way."""
    return [
        pb.NamedTensor(name=name, tensor=encode(tensor, torch.float32))
        for name, tensor in tensors.items()
    ]


def decode_named(messages: Iterable[pb.NamedTensor]) -> dict[str, Tensor]:
    """Rebuild `encode_named`; a scalar or an empty tensor is refused like any odd shape."""
    return {message.name: decode(message.tensor, f"'{message.name}'") for message in messages}


def check_version(message: pb.Tensor, what: str) -> None:
    """Refuse another wire version's tensor."""
    if message.version != WIRE_VERSION:
        raise TrunkError(
            f"{what}: wire version {message.version} came, version {WIRE_VERSION} is spoken here; "
            "run the same release of Graft on both sides",
            kind="version",
        )


def shape_of(message: pb.Tensor, what: str) -> tuple[int, ...]:
    """The shape a message claims; `TrunkError` if its dimensions are too many, none, or zero."""
    if not 1 <= len(message.shape) <= MAX_DIMENSIONS:
        raise TrunkError(f"{what}: {len(message.shape)} dimensions are not accepted", kind="shape")
    shape = tuple(message.shape)
    if 0 in shape:
        raise TrunkError(f"{what}: shape {shape} is not accepted", kind="shape")
    return shape


def _into_fp16_range(tensor: Tensor) -> tuple[Tensor, float]:
    largest = float(tensor.abs().max())
    if not math.isfinite(largest) or largest == 0:
        return tensor, 1.0
    # 2**14 leaves a factor of four below fp16's largest number; fp32 itself bounds the exponent.
    scale = 2.0 ** max(-126, math.frexp(largest)[1] - 14)
    return tensor.float() / scale, scale
