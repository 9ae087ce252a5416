"""Principal axes of rows: learnt by an encoder, rounded, and known to both sides.

Shapes: N rows, D hidden size; channels are taken in blocks of W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AXES_CLASS = 4
"""Class of their numbers among the entropy-coded."""

LARGEST = 40
"""No component is larger or smaller than all are on average by more quarters of an octave."""

_BLOCK = 1024
"""Most channels that are turned together: wider rows are turned in several blocks."""

_COARSE = 0.5
"""Axes are rounded to this share of what their numbers are on average."""

_BITS = 3.2
"""That a number of an axis takes."""

_SHRINK = 0.1
"""Share of the covariances that is not believed."""

_ENOUGH = 1024
"""Most rows of a tensor that covariances are learnt from."""

_PRIOR, _MEMORY = 8, 2048
"""Rows that count for what is expected at first, and that sizes are averaged over at most."""


def widths(width: int) -> list[int]:
    """Of the blocks of a row."""
    count = math.ceil(width / _BLOCK)
    return [width * (n + 1) // count - width * n // count for n in range(count)]


def axes_size(width: int) -> int:
    """How many numbers the axes of a row are."""
    return sum(W * W for W in widths(width))


def axes_fit(rows: int, width: int) -> bool:
    """Whether so many rows take more than the axes: else those are not sent, lest one frame be much
    larger than the others."""
    return _BITS * axes_size(width) <= 16 * rows * width


def turned(rows_ND: Tensor, axes: Sequence[Tensor], *, back: bool = False) -> Tensor:
    """Rows in terms of the axes, or back; as they are if there are none."""
    if not axes:
        return rows_ND
    blocks = rows_ND.split([len(axes_WW) for axes_WW in axes], 1)
    pairs = zip(blocks, axes, strict=True)
    return torch.cat([block @ (axes_WW.T if back else axes_WW) for block, axes_WW in pairs], 1)


def numbers_of(axes: Sequence[Tensor]) -> NDArray[np.int32]:
    """Axes, rounded, as whole numbers."""
    rounded = [(axes_WW * (math.sqrt(len(axes_WW)) / _COARSE)).round() for axes_WW in axes]
    return torch.cat([each.flatten() for each in rounded]).int().numpy()


def axes_of(numbers: NDArray[np.int32], width: int) -> list[Tensor]:
    """The orthonormal axes nearest to rounded ones, by Newton and Schulz' iteration.

    Raises
    ------
    ValueError
        If there are none near.
    """
    axes = []
    for W in widths(width):
        some, numbers = numbers[: W * W], numbers[W * W :]
        axes_WW = torch.from_numpy(some).float().reshape(W, W) * (_COARSE / math.sqrt(W))
        for _ in range(8):
            axes_WW = 1.5 * axes_WW - 0.5 * axes_WW @ (axes_WW.T @ axes_WW)
        if not (axes_WW.T @ axes_WW - torch.eye(W)).abs().max() < 1e-3:
            raise ValueError("principal axes are not orthogonal")
        axes.append(axes_WW)
    return axes


class Learning:
    """What an encoder learns of rows of about length sqrt(D): their components' sizes, their axes.

    Parameters
    ----------
    width : int
        D.
    step : int
        That they are rounded to, in quarters of an octave.
    """

    def __init__(self, width: int, step: int) -> None:
        self._step = 2.0 ** (step / 4)
        self._second = [torch.zeros(W, W) for W in widths(width)]
        self._square_D = torch.full((width,), float(_PRIOR))
        self._weight, self._seen, self._unpaid = float(_PRIOR), 0, 0
        self._due = 2 * len(self._second[0])

    def take(self, rows_ND: Tensor, axes: Sequence[Tensor]) -> NDArray[np.int32]:
        """Learn from rows; returns the size of each component, in quarters of an octave."""
        some = rows_ND[:: 1 + len(rows_ND) // (_ENOUGH + 1)]
        blocks = some.split([len(each) for each in self._second], 1)
        for second_WW, block in zip(self._second, blocks, strict=True):
            second_WW.addmm_(block.T, block)
        self._seen += len(some)
        self._unpaid += len(rows_ND)
        self._square_D += turned(rows_ND, axes).square().sum(0)
        self._weight += len(rows_ND)
        sizes_D = (2 * (self._square_D / self._weight).clamp_min(1e-9).log2()).round()
        self._remember(_MEMORY)
        return sizes_D.clamp_(-LARGEST, LARGEST).int().numpy()

    def better_axes(self, rows_ND: Tensor, axes: Sequence[Tensor]) -> list[Tensor]:
        """Axes that would have paid for what they take, had they been known; else nothing.

        What they save is measured on rows that are not learnt from yet.
        """
        if self._seen < self._due or not axes_fit(*rows_ND.shape):
            return []
        cost = _BITS * axes_size(rows_ND.shape[1])
        self._due = 2 * self._seen
        better = [self._principal(second_WW) for second_WW in self._second]
        saved = self._bits(turned(rows_ND, axes)) - self._bits(turned(rows_ND, better))
        if saved * self._unpaid < cost:
            return []
        self._unpaid = 0
        pairs = zip(better, self._second, strict=True)
        self._square_D = torch.cat([(V_WW * (C_WW @ V_WW)).sum(0) for V_WW, C_WW in pairs])
        self._weight = float(self._seen)
        self._remember(_MEMORY // 2)
        return better

    def state_dict(self) -> dict[str, Tensor]:
        """All of it, by name."""
        counts = torch.tensor([self._weight, self._seen, self._unpaid, self._due]).double()
        second = {f"second.{n}": each for n, each in enumerate(self._second)}
        return {"counts": counts, "square": self._square_D, **second}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        self._weight, *counts = state["counts"].tolist()
        self._seen, self._unpaid, self._due = map(int, counts)
        self._square_D = state["square"].clone()
        self._second = [state[f"second.{n}"].clone() for n in range(len(self._second))]

    def _remember(self, rows: int) -> None:
        """Let no more rows count than these."""
        if self._weight > rows:
            self._square_D *= rows / self._weight
            self._weight = float(rows)

    def _principal(self, second_WW: Tensor) -> Tensor:
        mean_WW = second_WW * ((1 - _SHRINK) / self._seen)
        mean_WW += (second_WW.diag() * (_SHRINK / self._seen)).diag()
        vectors: Tensor = torch.linalg.eigh(mean_WW).eigenvectors
        return vectors

    def _bits(self, rows_ND: Tensor) -> float:
        """About what a row takes."""
        return float((1 + 12 * rows_ND.square().mean(0) / self._step**2).log2().sum() / 2)
