"""What a codec is: how the tensors of one crossing of one session become bytes, and come back.

A new codec is one file in this folder with a subclass of `Codec`; `link.codec` takes its `name`.

Shapes: B sequences, T tokens, D hidden size; N positions that hold a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from conf.registry import kinds
from strategies.errors import TrunkError
from strategies.optim import derive_seed
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import shape_of
from strategies.transport.payload import Data, Parcel, Payload


class Codec:
    """One crossing of one session. It may have a state: a tensor is encoded once and decoded once,
    in order, and what is sent again are the same bytes.

    A subclass gives a `name` and implements `sizes`, `pack` and `unpack`; whatever comes in is
    checked here before `unpack` sees it. Positions of padding do not travel: what is packed are the
    rows of the positions that the mask names.

    Parameters
    ----------
    seed : int
        Of the session and the crossing, for codecs that draw random numbers; both sides have it.
    gradient : bool
        Whether gradients cross here, whose rounding must not be biased, or activations.
    """

    name: ClassVar[str] = ""
    """How `link.codec` and the wire call it."""

    difference: ClassVar[str] = ""
    """The codec of what an activation has changed by since the other side last had it, which a few
    bits say as well; empty: it is written whole, for nothing would be saved."""

    def __init__(self, seed: int = 0, *, gradient: bool = False) -> None:
        self.seed, self.gradient = seed, gradient

    def sizes(self, rows: int, width: int) -> tuple[int, int]:
        """Fewest and most bytes of data that (rows, width) may come in."""
        raise NotImplementedError

    def pack(self, rows_ND: Tensor, generator: torch.Generator) -> Data:
        """Turn contiguous fp32 rows on the CPU into data.

        `generator` depends on the session, the crossing, the step and the micro-batch alone, so
        that what is drawn from it is the same over every transport. What is not finite must not
        come back as finite: whoever receives it refuses it by name.
        """
        raise NotImplementedError

    def unpack(self, data: memoryview, shape: tuple[int, int]) -> Tensor:
        """Turn data of a right size back into rows (N, D), floating point; `ValueError` if it
        cannot be.

        It must take no more memory than the shape does.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What a session needs that goes on in another process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""

    def encode(
        self, tensor_BTD: Tensor, mask_BT: Tensor | None, step: int, micro: int, parcel: Parcel
    ) -> pb.Tensor:
        """Put a floating-point tensor of this step and micro-batch into a parcel.

        `mask_BT` is zero where there is padding; None: nowhere.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step, micro))
        rows_ND = tensor_BTD.detach().flatten(0, 1)
        if mask_BT is not None:
            rows_ND = rows_ND[mask_BT.flatten().bool().to(rows_ND.device)]
        data = self.pack(rows_ND.to("cpu", torch.float32).contiguous(), generator)
        return parcel.put(tensor_BTD.shape, self.name, data)

    def decode(
        self, message: pb.Tensor, mask_BT: Tensor | None, payload: Payload, what: str
    ) -> Tensor:
        """Rebuild a tensor whose shape (B, T, D) has been found to be right, and the mask's too.

        Returns
        -------
        Tensor
            Floating point, on the CPU, its own memory; zero where there is padding.

        Raises
        ------
        TrunkError
            Before memory is taken, for another codec, or data of an impossible size.
        """
        if message.codec != self.name:
            raise self._other(message, what)
        if len(claimed := shape_of(message, what)) != 3:
            raise TrunkError(f"{what}: shape {claimed} is not (B, T, D)", kind="shape")
        B, T, D = claimed
        kept = None if mask_BT is None else mask_BT.flatten().bool().cpu()
        shape = (B * T if kept is None else int(kept.sum()), D)
        data = payload.of(message, what)
        least, most = self.sizes(*shape)
        if not least <= len(data) <= most:
            raise TrunkError(
                f"{what}: {shape[0]} positions of {D} in codec {self.name} take {least} to {most} "
                f"bytes, {len(data)} came",
                kind="shape",
            )
        try:
            rows_ND = self.unpack(data, shape)
        except ValueError as error:
            raise TrunkError(f"{what} is no codec {self.name}: {error}", kind="codec") from None
        if kept is None:
            return rows_ND.view(B, T, D)
        tensor = rows_ND.new_zeros(B * T, D)
        tensor[kept] = rows_ND
        return tensor.view(B, T, D)

    def most_bytes(self, elements: int, width: int) -> int:
        """Most bytes of data for so many elements in rows of this width."""
        return self.sizes(math.ceil(elements / width), width)[1]

    def _other(self, message: pb.Tensor, what: str) -> TrunkError:
        """Why a message of another codec is refused."""
        came, known = message.codec[:40], kinds(__name__.rpartition(".")[0], Codec)
        words = f"{came} came, {self.name} was agreed; start both sides with the same link.codec"
        if came not in known:
            words = f"codec {came!r} is not known here; known are {', '.join(known)}"
        return TrunkError(f"{what}: {words}", kind="codec")
