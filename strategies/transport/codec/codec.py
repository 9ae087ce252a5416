"""What a codec is: how the tensors of one crossing of one session become bytes, and come back.

A new codec is one file in this folder with a subclass of `Codec`; `link.dtype` takes its `name`.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from conf.registry import kinds
from strategies.errors import TrunkError
from strategies.optim import derive_seed
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import WIRE_VERSION, check_version, shape_of


class Codec:
    """One crossing of one session. It may have a state: a tensor is encoded once, and what is sent
    again are the same bytes.

    A subclass gives a `name` and implements `sizes`, `pack` and `unpack`; whatever comes in is
    checked here before `unpack` sees it.

    Parameters
    ----------
    seed : int
        Of the session and the crossing, for codecs that draw random numbers.
    """

    name: ClassVar[str] = ""
    """How `link.dtype` and the wire call it."""
    most_bytes: ClassVar[float] = 4.0
    """Of data for one element, at most; what bounds a frame."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def sizes(self, elements: int) -> tuple[int, int]:
        """Fewest and most bytes of data that so many elements may come in."""
        return 0, math.ceil(elements * self.most_bytes)

    def pack(self, tensor: Tensor, generator: torch.Generator) -> bytes:
        """Turn an fp32 tensor on the CPU into data.

        `generator` depends on the session, the crossing, the step and the micro-batch alone, so
        that what is drawn from it is the same over every transport and in every order.
        """
        raise NotImplementedError

    def unpack(self, data: bytes, shape: tuple[int, ...]) -> Tensor:
        """Turn data of a right size back into a tensor of this shape; `ValueError` if it cannot be.

        It must take no more memory than the shape does.
        """
        raise NotImplementedError

    def encode(self, tensor: Tensor, step: int, micro: int) -> pb.Tensor:
        """Describe a floating-point tensor of this step and micro-batch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, micro))
        return pb.Tensor(
            version=WIRE_VERSION,
            shape=tensor.shape,
            codec_name=self.name,
            data=self.pack(tensor.detach().to("cpu", torch.float32), generator),
        )

    def decode(self, message: pb.Tensor, what: str) -> Tensor:
        """Rebuild a tensor whose shape has been found to be right.

        Raises
        ------
        TrunkError
            Before memory is taken, for another version or codec, or data of an impossible size.
        """
        check_version(message, what)
        if message.codec_name != self.name:
            raise self._other(message, what)
        shape = shape_of(message, what)
        least, most = self.sizes(math.prod(shape))
        if not least <= len(message.data) <= most:
            raise TrunkError(
                f"{what}: shape {shape} in codec {self.name} takes {least} to {most} bytes, "
                f"{len(message.data)} came",
                kind="shape",
            )
        try:
            return self.unpack(message.data, shape)
        except ValueError as error:
            raise TrunkError(f"{what} is no codec {self.name}: {error}", kind="codec") from None

    def _other(self, message: pb.Tensor, what: str) -> TrunkError:
        """Why a message of another codec is refused."""
        came, known = message.codec_name[:40], kinds(__name__.rpartition(".")[0], Codec)
        if came and came not in known:
            words = f"codec {came!r} is not known here; known are {', '.join(known)}"
        else:
            came = came or f"dtype {message.dtype}, codec {message.codec}"
            words = (
                f"{came} came, {self.name} was agreed; start both sides with the same link.dtype"
            )
        return TrunkError(f"{what}: {words}", kind="codec")
