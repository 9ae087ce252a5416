"""What a frame carries besides its head: the data of its tensors, one after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb

Data = bytes | memoryview | npt.NDArray[np.uint8]
"""Bytes, however they are held."""


class Parcel:
    """The data of a frame that is being made; nothing is copied before the frame is."""

    def __init__(self) -> None:
        self.parts: list[memoryview] = []
        self._size = 0

    def put(self, shape: Sequence[int], codec: str, data: Data) -> pb.Tensor:
        """Add a tensor's data; returns what the head says of it."""
        part = memoryview(data).cast("B")  # type: ignore[arg-type]
        tensor = pb.Tensor(shape=shape, codec=codec, offset=self._size, size=len(part))
        self.parts.append(part)
        self._size += len(part)
        return tensor


class Payload:
    """The data of a frame that came.

    Parameters
    ----------
    data : bytes or memoryview
        Of all its tensors; nothing in it is trusted.
    """

    def __init__(self, data: bytes | memoryview = b"") -> None:
        self._data = memoryview(data)

    def of(self, tensor: pb.Tensor, what: str) -> memoryview:
        """The data of a tensor; `TrunkError` if it does not lie within the payload."""
        end = tensor.offset + tensor.size
        if end > len(self._data):
            raise TrunkError(
                f"{what}: its data ends at byte {end} of a payload of {len(self._data)}",
                kind="shape",
            )
        return self._data[tensor.offset : end]
