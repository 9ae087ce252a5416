"""The codecs `fp32`, `bf16` and `fp16`: elements as they are, in one of the wire's own types."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec import tensors
from strategies.transport.codec.codec import Codec


class Raw(Codec):
    """Elements in a type that the wire has a number for."""

    dtype: ClassVar[torch.dtype]

    def encode(self, tensor: Tensor, step: int, micro: int) -> pb.Tensor:
        """Describe a tensor in this type; `tensors.encode` says how fp16 is scaled."""
        return tensors.encode(tensor, self.dtype)

    def decode(self, message: pb.Tensor, what: str) -> Tensor:
        """Rebuild a tensor of this type; see `tensors.decode`."""
        if message.codec_name:
            raise self._other(message, what)
        return tensors.decode(message, what, self.dtype)


class Fp32(Raw):
    """Nothing is rounded."""

    name = "fp32"
    dtype = torch.float32


class Bf16(Raw):
    """Rounded to 8 bits of precision, in the range of fp32."""

    name = "bf16"
    most_bytes = 2.0
    dtype = torch.bfloat16


class Fp16(Raw):
    """Rounded to 11 bits of precision, with a scale for each tensor."""

    name = "fp16"
    most_bytes = 2.0
    dtype = torch.float16
