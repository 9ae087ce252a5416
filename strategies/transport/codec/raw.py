"""The codecs `fp32`, `bf16` and `fp16`: elements as they are, in a type of so many bits."""

from __future__ import annotations

import math
import struct
from typing import ClassVar

import torch
from torch import Tensor

from strategies.transport.codec.codec import Codec
from strategies.transport.codec.tensors import as_bytes, from_bytes
from strategies.transport.payload import Data

_SCALE = struct.Struct("<f")


class Raw(Codec):
    """Elements in a type of the machine's, little-endian and row by row."""

    dtype: ClassVar[torch.dtype]

    def sizes(self, rows: int, width: int) -> tuple[int, int]:
        """Always the same number."""
        size = rows * width * self.dtype.itemsize
        return size, size

    def pack(self, rows_ND: Tensor, generator: torch.Generator) -> Data:
        """Round to the type; fp32 is not even copied."""
        return as_bytes(rows_ND.to(self.dtype))

    def unpack(self, data: memoryview, shape: tuple[int, int]) -> Tensor:
        """The elements, in their type."""
        return from_bytes(data, shape, self.dtype)


class Fp32(Raw):
    """Nothing is rounded."""

    name = "fp32"
    dtype = torch.float32


class Bf16(Raw):
    """Rounded to 8 bits of precision, in the range of fp32."""

    name = "bf16"
    dtype = torch.bfloat16


class Fp16(Raw):
    """Rounded to 11 bits of precision, with a scale for each tensor, which comes before it.

    The scale is a power of two: gradients are often below fp16's smallest normal number (6e-5), and
    scaling by a power of two loses nothing else.
    """

    name = "fp16"
    dtype = torch.float16

    def sizes(self, rows: int, width: int) -> tuple[int, int]:
        """The scale, and two bytes for each element."""
        size = _SCALE.size + rows * width * self.dtype.itemsize
        return size, size

    def pack(self, rows_ND: Tensor, generator: torch.Generator) -> Data:
        """Scale and round."""
        scaled, scale = _into_range(rows_ND)
        return _SCALE.pack(scale) + as_bytes(scaled.to(self.dtype))

    def unpack(self, data: memoryview, shape: tuple[int, int]) -> Tensor:
        """The elements in fp32, at their scale."""
        (scale,) = _SCALE.unpack_from(data)
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale {scale} is not a positive number")
        return from_bytes(data[_SCALE.size :], shape, self.dtype).float() * scale


def _into_range(rows_ND: Tensor) -> tuple[Tensor, float]:
    largest = float(rows_ND.abs().max())
    if not math.isfinite(largest) or largest == 0:
        return rows_ND, 1.0
    # 2**14 leaves a factor of four below fp16's largest number; fp32 itself bounds the exponent.
    scale = 2.0 ** max(-126, math.frexp(largest)[1] - 14)
    return rows_ND / scale, scale
