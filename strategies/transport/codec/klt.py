"""The codec `klt`: rows in their own principal axes, rounded to a step, and entropy-coded.

Shapes: N rows, D hidden size. Sizes are whole numbers of quarters of an octave: n for 2**(n / 4).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.transport.codec.axes import (
    AXES_CLASS,
    LARGEST,
    Learning,
    axes_fit,
    axes_of,
    axes_size,
    numbers_of,
    turned,
    widths,
)
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.entropy import FARTHEST, PHASES, Reader, Writer, class_keys
from strategies.transport.codec.tensors import as_bytes, from_bytes
from strategies.transport.payload import Data

_HEAD = struct.Struct("<BfhI")
"""What follows, scale of the tensor, its size, seed of the dither."""

_RAW, _MEAN, _AXES = 4, 1, 2

_LEAST = -120
"""A row that is smaller than the largest element by more than this is zero."""

_WHOLE = 128
"""Added to the size of a row that the mean was not taken off."""

_SMALLEST = 2.0**-149
"""Of the positive numbers of fp32."""

_LONG, _LONGEST = 8, 56
"""A row that is larger than the middle one by more than this is rounded more finely, and by more
than that no more so: its elements are to stay below `FARTHEST` steps."""

_CHANGES_CLASS = -2
"""Class of the changes of components' sizes."""


class Klt(Codec):
    """Karhunen-Loeve transform, uniform rounding and entropy coding, adapted while it is used.

    What the decoder must know of the rows travels with them, rounded: the size of each row and each
    component, the mean row, and the principal axes once the encoder has seen so many rows that they
    would have paid. So there is nothing to calibrate, and nothing that two machines might compute
    differently.

    - Activations are rounded to the nearest multiple of a step that is relative to their row.
    - Gradients: of one that is relative to the tensor, and smaller where a component is smaller
      than that; with a dither that the decoder takes off again, so that errors have no bias.

    References
    ----------
    Goyal, "Theoretical Foundations of Transform Coding", 2001; Zamir and Feder, "On Universal
    Quantization by Randomized Uniform/Lattice Quantizers", 1992, for the dither; Duda, "Asymmetric
    Numeral Systems", 2013.
    """

    name = "klt"
    difference = "klt-rough"
    steps: ClassVar[tuple[int, int]] = (-8, 1)
    """For activations, relative to the row, and for gradients, relative to the tensor."""

    def __init__(self, seed: int = 0, *, gradient: bool = False) -> None:
        super().__init__(seed, gradient=gradient)
        self._step = self.steps[gradient]
        self._mean_D = torch.zeros(0)
        self._sizes_D = np.zeros(0, np.int32)
        self._axes: list[Tensor] = []
        self._learning: Learning | None = None

    def sizes(self, rows: int, width: int) -> tuple[int, int]:
        """The size of a component that has not changed takes most of a bit, what is zero nothing.
        No number takes more than 8 bytes; axes travel only with a larger tensor."""
        least = _HEAD.size + min(4 + rows + width // 16, 4 * rows * width)
        return least, _HEAD.size + 2 * width + rows + 12 * (rows + 1) * width + 16

    def pack(self, rows_ND: Tensor, generator: torch.Generator) -> Data:
        """Less the mean, turned, rounded, coded."""
        seed = int(torch.randint(2**32, (), generator=generator))
        largest = float(rows_ND.abs().max())
        if not largest < 1e37:
            return _HEAD.pack(_RAW, 0.0, 0, 0) + as_bytes(rows_ND)
        self._begin(rows_ND.shape[1])
        unit = largest or 1.0
        mean_D = _better_mean(rows_ND.div(unit), self._mean_D / unit)
        if mean_D is not None:
            self._mean_D = (mean_D * unit).bfloat16().float()
        rows_ND, whole_N = _less(rows_ND.div(unit), self._mean_D / unit)
        share = float(rows_ND.abs().max()) or 1.0
        sizes_N, size = _sizes_of(rows_ND.div_(share))
        live = sizes_N >= _LEAST
        writer = Writer()
        axes = self._write(writer, rows_ND[torch.from_numpy(live)], sizes_N[live], size, seed)
        flags = _MEAN * (mean_D is not None) + _AXES * axes
        return b"".join(
            [
                _HEAD.pack(flags, max(share * unit, _SMALLEST), size, seed),
                b"" if mean_D is None else as_bytes(self._mean_D.bfloat16()),
                (np.where(live, sizes_N - _LEAST + 1, 0) + _WHOLE * whole_N.numpy())
                .astype(np.uint8)
                .tobytes(),
                writer.data(),
            ]
        )

    def unpack(self, data: memoryview, shape: tuple[int, int]) -> Tensor:
        """As it was packed, backwards."""
        N, D = shape
        flags, scale, size, seed = _HEAD.unpack_from(data)
        data = data[_HEAD.size :]
        if flags == _RAW:
            return from_bytes(data, shape, torch.float32)
        if flags > _MEAN + _AXES or not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"flags are {flags}, the scale is {scale}")
        if flags & _AXES and not axes_fit(N, D):
            raise ValueError(f"axes of {D} channels came with {N} rows")
        self._begin(D)
        if flags & _MEAN:
            self._mean_D = from_bytes(data[: 2 * D], (D,), torch.bfloat16).float()
            data = data[2 * D :]
        bytes_N = from_bytes(data[:N], (N,), torch.uint8)
        sizes_N = (bytes_N % _WHOLE).int().numpy() + _LEAST - 1
        live = sizes_N >= _LEAST
        rows_ND, reader = torch.zeros(N, D), Reader(data[N:])
        rows_ND[torch.from_numpy(live)] = self._read(
            reader, sizes_N[live], size, seed, axes=bool(flags & _AXES)
        )
        reader.end()
        return rows_ND.mul_(scale).addr_((bytes_N < _WHOLE).float(), self._mean_D)

    def state_dict(self) -> dict[str, Tensor]:
        """What is known to both sides, and what an encoder learnt."""
        if not len(self._sizes_D):
            return {}
        known = {"mean": self._mean_D, "sizes": torch.from_numpy(self._sizes_D)}
        if self._axes:
            known["axes"] = torch.cat([each.flatten() for each in self._axes])
        return {**known, **(self._learning.state_dict() if self._learning else {})}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        if not state:
            return
        self._mean_D, self._sizes_D = state["mean"].clone(), state["sizes"].numpy().copy()
        if "axes" in state:
            each = widths(len(self._sizes_D))
            blocks = state["axes"].clone().split([W * W for W in each])
            self._axes = [block.view(W, W) for block, W in zip(blocks, each, strict=True)]
        if "counts" in state:
            self._learning = Learning(len(self._sizes_D), self._step)
            self._learning.load_state_dict(state)

    def _write(
        self, writer: Writer, rows_ND: Tensor, sizes_N: NDArray[np.int32], size: int, seed: int
    ) -> bool:
        """Write rows, and perhaps axes before them; whether so."""
        learning = self._learning = self._learning or Learning(rows_ND.shape[1], self._step)
        rows_ND = rows_ND / _powers(sizes_N)[:, None]
        axes = learning.better_axes(rows_ND, self._axes)
        if axes:
            numbers = numbers_of(axes)
            writer.put(numbers, class_keys(np.full(len(numbers), AXES_CLASS)))
            self._axes = axes_of(numbers, rows_ND.shape[1])
        sizes_D = learning.take(rows_ND, self._axes)
        writer.put(sizes_D - self._sizes_D, class_keys(np.full(len(sizes_D), _CHANGES_CLASS)))
        self._sizes_D = sizes_D
        finer, keys, dither_ND = self._plan(sizes_N, size, seed)
        steps_ND = turned(rows_ND, self._axes) * _powers(finer) - dither_ND
        writer.put(steps_ND.round_().clamp_(-FARTHEST, FARTHEST).int().numpy().reshape(-1), keys)
        return bool(axes)

    def _read(
        self, reader: Reader, sizes_N: NDArray[np.int32], size: int, seed: int, *, axes: bool
    ) -> Tensor:
        """The rows that `_write` wrote."""
        D = len(self._sizes_D)
        if axes:
            self._axes = axes_of(reader.take(class_keys(np.full(axes_size(D), AXES_CLASS))), D)
        changes_D = reader.take(class_keys(np.full(D, _CHANGES_CLASS)))
        self._sizes_D = self._sizes_D + changes_D
        if max(sizes_N.max(initial=0), abs(size) + _LEAST, abs(self._sizes_D).max() - LARGEST) > 0:
            raise ValueError("a row, a component or the tensor has a size that none can have")
        finer, keys, dither_ND = self._plan(sizes_N, size, seed)
        steps_ND = torch.from_numpy(reader.take(keys)).view(len(sizes_N), D) + dither_ND
        rows_ND = turned(steps_ND * _powers(-finer), self._axes, back=True)
        return rows_ND * _powers(sizes_N)[:, None]

    def _begin(self, width: int) -> None:
        """At first, and of rows of another width, nothing is known."""
        if len(self._sizes_D) != width:
            self._mean_D, self._sizes_D = torch.zeros(width), np.zeros(width, np.int32)
            self._axes, self._learning = [], None

    def _plan(
        self, sizes_N: NDArray[np.int32], size: int, seed: int
    ) -> tuple[NDArray[np.int32], NDArray[np.uint16], Tensor]:
        """How much finer than the size of its row an element's step is; its class; its dither."""
        if not self.gradient:
            # The first token's row is many times the others': it gets half of that in precision.
            middle = np.sort(sizes_N)[len(sizes_N) // 2 :][:1]
            longer_N = np.clip(sizes_N - middle, _LONG, _LONGEST) - _LONG
            finer_N1 = (longer_N // 2 - self._step)[:, None]
            keys = class_keys(self._sizes_D + finer_N1)
            return finer_N1, keys, torch.zeros(())
        # A component far smaller than its step would come back as nothing but the dither.
        coarse_N1 = (sizes_N - size - self._step)[:, None]
        finer_ND = coarse_N1 - np.minimum(0, (self._sizes_D + coarse_N1 + 7) // 2)
        generator = torch.Generator().manual_seed(seed)
        dither_ND = torch.rand(finer_ND.shape, generator=generator)
        keys = class_keys(self._sizes_D + finer_ND, (dither_ND * PHASES).int().numpy())
        return finer_ND, keys, dither_ND - 0.5


class KltFine(Klt):
    """Half the error for a bit more: for what the loss feels most."""

    name = "klt-fine"
    difference = "klt-coarse"
    steps = (-12, -3)


class KltCoarse(Klt):
    """Half as much error again, for half a bit less."""

    name = "klt-coarse"
    difference = "klt-rough"
    steps = (-6, 3)


class KltRough(Klt):
    """Error about 29 % of a row: for what a row has changed by."""

    name = "klt-rough"
    difference = ""
    steps = (0, 3)


def _powers(sizes: NDArray[np.int32]) -> Tensor:
    """2**(n / 4) of each."""
    return torch.exp2(torch.from_numpy(sizes).float() / 4)


def _sizes_of(rows_ND: Tensor) -> tuple[NDArray[np.int32], int]:
    """The size of each row, none above 0, and of the tensor."""
    square_N = rows_ND.square().mean(1)
    size = round(2 * math.log2(max(float(square_N.mean()), 2.0 ** (_LEAST / 2))))
    sizes_N = (2 * square_N.clamp_min(1e-30).log2()).round().clamp_max_(0).int()
    return sizes_N.numpy(), size


def _less(rows_ND: Tensor, mean_D: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less the mean, but for those that are longer without; which these are (N,)."""
    less_ND = rows_ND - mean_D
    whole_N = less_ND.norm(dim=1) > rows_ND.norm(dim=1)
    less_ND[whole_N] = rows_ND[whole_N]
    return less_ND, whole_N


def _better_mean(rows_ND: Tensor, mean_D: Tensor) -> Tensor | None:
    """The mean row, if it saves more bits than it takes in bf16, compared with the one there is."""
    length_N = _less(rows_ND, mean_D)[0].norm(dim=1)
    usual = length_N <= 4 * length_N.median()
    better_D = rows_ND[usual].mean(0).bfloat16().float()
    less_N = _less(rows_ND, better_D)[0].norm(dim=1)
    saved = torch.log2(length_N.clamp_min(1e-30) / less_N.clamp_min(1e-30)).clamp_max(4).sum()
    return better_D if saved > 16 else None
