"""A random rotation of rows, after which all elements of a row are about normal and alike.

Shapes: N rows, D hidden size.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_FACTOR = 64
"""Largest Hadamard matrix that is multiplied by as it stands; larger ones are products of them."""


class Rotation:
    """Random signs and a Hadamard transform, over the first and then the last channels.

    A Hadamard matrix has a power of two of rows: each transform takes as many channels as it can,
    and where that is not all of them, a second one mixes the rest with those before.

    Parameters
    ----------
    seed : int
        Of the signs; the same on both sides.
    width : int
        D.
    rounds : int
        How often all of this is done. After one round the elements of a row with one large channel
        have only two sizes; after two, with new signs, they are about normal, whatever the row was.

    References
    ----------
    Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024; Tseng et al.,
    "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks", 2024.
    """

    def __init__(self, seed: int, width: int, rounds: int = 1) -> None:
        size = 1 << (width.bit_length() - 1)
        once = [slice(size)] if size == width else [slice(size), slice(width - size, None)]
        parts = once * rounds
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (len(parts), width), generator=generator) * 2.0 - 1.0
        self._steps = list(zip(signs, parts, strict=True))

    def forward(self, rows_ND: Tensor) -> Tensor:
        """The rows, rotated; lengths stay."""
        rows_ND = rows_ND.clone()
        for signs_D, channels in self._steps:
            rows_ND = self._transformed(rows_ND.mul_(signs_D), channels)
        return rows_ND

    def back(self, rows_ND: Tensor) -> Tensor:
        """The rows as they were; what is given is overwritten."""
        for signs_D, channels in reversed(self._steps):
            rows_ND = self._transformed(rows_ND, channels).mul_(signs_D)
        return rows_ND

    def _transformed(self, rows_ND: Tensor, channels: slice) -> Tensor:
        """The rows after a Hadamard transform of these channels, perhaps in the same memory."""
        part = _hadamard(rows_ND[:, channels].contiguous())
        if part.shape == rows_ND.shape:
            return part
        rows_ND[:, channels] = part
        return rows_ND


def _hadamard(rows: Tensor) -> Tensor:
    """The transform of contiguous rows, whose width is a power of two."""
    shape, behind = rows.shape, 1
    while behind < shape[1]:
        factor = min(_FACTOR, shape[1] // behind)
        matrix = _matrix(factor)
        if behind == 1:
            rows = rows.view(-1, factor) @ matrix
        else:
            rows = matrix @ rows.view(-1, factor, behind)
        behind *= factor
    return rows.view(shape)


@cache
def _matrix(size: int) -> Tensor:
    """Sylvester's Hadamard matrix, scaled to keep lengths; it is symmetric and its own inverse."""
    if size == 1:
        return torch.ones(1, 1)
    half = _matrix(size // 2) * 2**-0.5
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
