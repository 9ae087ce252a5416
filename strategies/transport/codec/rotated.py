"""The codecs `int8` to `int2`: rows rotated at random, and rounded to so many bits an element.

Shapes: N rows, D hidden size; K channels apart.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.transport.codec.bits import pack_bits, packed_size, unpack_bits
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.rotation import Rotation
from strategies.transport.payload import Data

_HEAD = struct.Struct("<IfII")
"""Seed of the rotation, scale of the tensor, number of channels apart, whether there is a mean."""

_APART = 16
"""Of so many channels one may be apart."""

_SPREAD = {1: 1.25, 2: 1.46, 3: 1.52, 4: 1.58, 5: 1.64, 6: 1.68, 7: 1.70, 8: 1.72}
"""By bits: cells hold equal shares of a normal distribution that is so much wider than the
elements'. Best for the mean square (least loss against Lloyd's cells, 0.02 dB)."""


class Rotated(Codec):
    """`bits` bits for each element of a randomly rotated row, with a scale for each row.

    - The mean row and channels far larger than the others (K of them) travel apart, in bf16, where
      they save more bits than they take. A row that is longer without the mean keeps it: zeros stay
      zeros, and small rows their digits. The sign of its scale says so.
    - After the rotation a row is about normal, whatever it was: its elements are rounded to levels
      made for that, as many as the bits can tell apart. A row has its own scale (bf16), so that the
      first token's, which is a hundred times the others', takes nothing from them.
    - For activations the scale is the one of the least square error. For gradients it makes the
      rounding unbiased along the row, and, as far as the rotation makes the row normal, in each
      element: over the rotations, a new one for each tensor, the mean of what comes back is what
      was sent. Two rounds of it do so for any row of 128 channels or more; below, a row with one
      large channel keeps a bias. At 2 bits the error is 0.36 of a row's length, stochastic rounding
      has twice that.

    References
    ----------
    Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for
    Federated Learning", 2022: the unbiased scale.
    """

    bits: ClassVar[int]

    def sizes(self, rows: int, width: int) -> tuple[int, int]:
        """Least if nothing is apart."""
        least = _HEAD.size + 2 * rows + packed_size(rows * width, self.bits)
        return least, least + 2 * width + width // _APART * (4 + 2 * rows)

    def pack(self, rows_ND: Tensor, generator: torch.Generator) -> Data:
        """Scale, take apart, rotate, round."""
        N, D = rows_ND.shape
        seed = int(torch.randint(2**32, (), generator=generator))
        scale = float(rows_ND.abs().max())
        if not math.isfinite(scale):  # the whole tensor comes back so
            return _HEAD.pack(seed, math.nan, 0, 0) + bytes(self.sizes(N, D)[0] - _HEAD.size)
        rows_ND = rows_ND / (scale or 1.0)
        mean_D, whole_N, rows_ND = _without_mean(rows_ND, self.bits)
        apart_K = _channels_apart(rows_ND)
        outliers_NK = rows_ND[:, apart_K]
        rows_ND[:, apart_K] = 0.0
        rotation = self._rotation(seed, D)
        rounded = [self._rounded(rotation.forward(some)) for some in rows_ND.split(_some(D))]
        levels_ND, scales_N = (torch.cat(each) for each in zip(*rounded, strict=True))
        scales_N[whole_N] *= -1
        return b"".join(
            [
                _HEAD.pack(seed, scale, len(apart_K), len(mean_D) > 0),
                apart_K.numpy().astype("<u4").tobytes(),
                *(_bf16(each) for each in (mean_D, outliers_NK, scales_N)),
                pack_bits(levels_ND.numpy().reshape(-1), self.bits).tobytes(),
            ]
        )

    def unpack(self, data: memoryview, shape: tuple[int, int]) -> Tensor:
        """Levels to numbers, rotate back, put together."""
        N, D = shape
        seed, scale, K, has_mean = _HEAD.unpack_from(data)
        if K > D // _APART or has_mean > 1:
            raise ValueError(f"{K} channels apart of {D}, and {has_mean} mean rows")
        expected = self.sizes(N, D)[0] + K * (4 + 2 * N) + has_mean * 2 * D
        if len(data) != expected:
            raise ValueError(f"{K} channels apart take {expected} bytes, {len(data)} came")
        at = _HEAD.size + 4 * K
        apart_K = np.frombuffer(data[_HEAD.size : at], "<u4").astype(np.int64)
        if (apart_K >= D).any() or (np.diff(apart_K) <= 0).any():
            raise ValueError(f"channels apart are not in order or not below {D}")
        parts = np.frombuffer(data[at:], "<u2", count=has_mean * D + K * N + N)
        mean_D, outliers, scales = np.split(_from_bf16(parts), np.cumsum([has_mean * D, K * N]))
        levels = unpack_bits(data[at + parts.nbytes :], N * D, self.bits)
        whole_N, scales = np.signbit(scales), np.abs(scales)
        rotation, rows_ND = self._rotation(seed, D), torch.empty(N, D)
        for at in range(0, N, some := _some(D)):
            back_ND = torch.from_numpy(
                _levels(self.bits)[levels[at * D : (at + some) * D]].reshape(-1, D)
            )
            back_ND *= torch.from_numpy(scales)[at : at + some, None]
            rows_ND[at : at + some] = rotation.back(back_ND)
        rows_ND[:, torch.from_numpy(apart_K)] = torch.from_numpy(outliers.reshape(N, K))
        if has_mean:
            rows_ND.addr_(torch.from_numpy(~whole_N).float(), torch.from_numpy(mean_D))
        return rows_ND.mul_(scale)

    def _rotation(self, seed: int, width: int) -> Rotation:
        return Rotation(seed, width, rounds=2 if self.gradient else 1)

    def _rounded(self, rows_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The level of each element (uint8), and what a row's levels are to be multiplied by."""
        length_N = rows_ND.square().mean(1).sqrt()
        normal_ND = rows_ND / length_N.clamp_min(1e-30)[:, None]
        count = 2**self.bits
        share_ND = torch.erf(normal_ND / (_SPREAD[self.bits] * 2**0.5)).add_(1).mul_(count / 2)
        levels_ND = share_ND.clamp_(0, count - 1).to(torch.uint8)
        back_ND = torch.from_numpy(_levels(self.bits)[levels_ND.numpy()])
        along_N = (normal_ND * back_ND).sum(1).clamp_min(1e-30)
        if self.gradient:
            return levels_ND, length_N * normal_ND.square().sum(1) / along_N
        return levels_ND, length_N * along_N / back_ND.square().sum(1)


def _some(width: int) -> int:
    """Rows that the processor's cache holds."""
    return 1 + 2**15 // width


@cache
def _levels(bits: int) -> NDArray[np.float32]:
    """What each cell of a normal distribution is rounded to: the mean within it."""
    shares = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64)
    edges = _SPREAD[bits] * 2**0.5 * torch.erfinv(2 * shares - 1)
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    within = (torch.erf(edges / 2**0.5) / 2).diff()
    levels: NDArray[np.float32] = (-density.diff() / within).float().numpy()
    return levels


def _without_mean(rows_ND: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean row, or nothing if it saves fewer bits than it takes in bf16; which rows keep it
    (N,), for they are longer without; and the rows less it.

    No element can save more than the `bits` that it takes.
    """
    length_N = rows_ND.norm(dim=1)
    usual = length_N <= 4 * length_N.median()
    mean_D = rows_ND[usual].mean(0).bfloat16().float()
    less_ND = rows_ND - mean_D
    ratio_N = length_N.clamp_min(1e-30) / less_ND.norm(dim=1).clamp_min(1e-30)
    whole_N = ratio_N < 1
    if torch.log2(ratio_N).clamp(0, bits).sum() <= 16:
        return mean_D[:0], torch.zeros_like(whole_N), rows_ND
    less_ND[whole_N] = rows_ND[whole_N]
    return mean_D, whole_N, less_ND


def _channels_apart(rows_ND: Tensor) -> Tensor:
    """Those, in order, that save more bits of all the others than they take in bf16.

    Rows count alike, and once more by their length: the first token's row has a channel of its own.
    """
    D = rows_ND.shape[1]
    square_ND = rows_ND.square()
    length_N = square_ND.sum(1)
    weight_N = 1 / length_N.clamp_min(1e-30) + 1 / length_N.mean().clamp_min(1e-30)
    energy, order = (weight_N @ square_ND).sort(descending=True, stable=True)
    left = (energy.sum() - energy.cumsum(0)).clamp_min(1e-12)[: D // _APART]
    saved = D / 2 * torch.log2(energy.sum().clamp_min(1e-12) / left)
    saved -= 16.0 * torch.arange(1, len(left) + 1)
    count = int(saved.argmax()) + 1 if len(left) and saved.max() > 0 else 0
    return order[:count].sort().values


def _bf16(tensor: Tensor) -> bytes:
    return tensor.bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()


def _from_bf16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (halves.astype(np.uint32) << 16).view(np.float32)


class Int8(Rotated):
    """Error about 0.4 % of a row."""

    name = "int8"
    difference = "int6"
    bits = 8


class Int6(Rotated):
    """Error about 1.5 %."""

    name = "int6"
    difference = "int4"
    bits = 6


class Int5(Rotated):
    """Error about 3 %."""

    name = "int5"
    difference = "int3"
    bits = 5


class Int4(Rotated):
    """Error about 6 % of activations, 10 % of gradients."""

    name = "int4"
    difference = "int2"
    bits = 4


class Int3(Rotated):
    """For gradients: error about 19 %."""

    name = "int3"
    bits = 3


class Int2(Rotated):
    """For gradients: error about 36 %."""

    name = "int2"
    bits = 2
