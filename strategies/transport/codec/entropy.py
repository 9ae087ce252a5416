"""Whole numbers with bell-shaped distributions of many widths, entropy-coded.

Both sides need the very same probabilities: they are made of nothing but additions,
multiplications, divisions and square roots, which are the same on every machine.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

_NARROWEST, _WIDEST = -16, 40
"""Numbers of class c have a standard deviation of about 2**(c / 4)."""

PHASES = 5
"""Dither is known to lie in one of so many parts of the interval from -1/2 to 1/2."""

FARTHEST = 2**19
"""No number may be larger."""

_MOST = 40
"""A number of at least so much is an escape, and lies behind."""

_ALPHABET = 2 * _MOST + 1
_FREEDOM = 8
"""Degrees of freedom of the distribution, Student's t: what crosses a cut has heavier tails than a
normal one."""

_FLOOR = 2.0**-20


def class_keys(
    classes: NDArray[np.int32], phases: NDArray[np.int32] | int = PHASES // 2
) -> NDArray[np.uint16]:
    """What `Writer` and `Reader` call classes and phases; the nearest, of those there are."""
    known = np.clip(classes, _NARROWEST, _WIDEST) - _NARROWEST
    return (known * PHASES + phases).astype(np.uint16).reshape(-1)


class Writer:
    """Takes numbers; `data` is what they come to."""

    def __init__(self) -> None:
        self._coded: list[tuple[NDArray[np.int32], Any]] = []
        self._beyond: list[NDArray[np.uint32]] = []

    def put(self, numbers: NDArray[np.int32], keys: NDArray[np.uint16]) -> None:
        """Take numbers, with a key of each."""
        order, groups = _groups(keys)
        numbers = numbers[order]
        for key, start, end in groups:
            shift = _shift(key)
            some = numbers[start:end]
            if shift:
                some = some + (1 << shift >> 1)
                self._coded.append((some & ((1 << shift) - 1), _uniform(1 << shift)))
                some = some >> shift
            self._coded.append((np.clip(some, -_MOST, _MOST) + _MOST, _model(key)))
            far = some[np.abs(some) >= _MOST]
            self._beyond.append((np.abs(far) - _MOST).astype(np.uint32))

    def data(self) -> bytes:
        """The number of words of the numbers, those, and the escapes."""
        coder = constriction.stream.stack.AnsCoder()
        for numbers, model in reversed(self._coded):
            coder.encode_reverse(np.ascontiguousarray(numbers, np.int32), model)
        words = coder.get_compressed()
        beyond = np.concatenate([*self._beyond, np.zeros(0, np.uint32)])
        parts = (np.array([len(words)]), words, beyond)
        return b"".join(each.astype("<u4").tobytes() for each in parts)


class Reader:
    """Gives the numbers of a `Writer` back, in the order in which they were put.

    Parameters
    ----------
    data : memoryview
        All that the writer wrote.

    Raises
    ------
    ValueError
        If it cannot be that.
    """

    def __init__(self, data: memoryview) -> None:
        if len(data) < 4 or len(data) % 4:
            raise ValueError(f"{len(data)} bytes are no entropy-coded words")
        words = np.frombuffer(data, "<u4").astype(np.uint32)
        if (count := int(words[0])) > len(words) - 1:
            raise ValueError(f"{count} words are coded, {len(words) - 1} came")
        if count and not words[count]:
            raise ValueError("the last word is zero")
        self._coder = constriction.stream.stack.AnsCoder(words[1 : count + 1])
        self._beyond = words[count + 1 :]

    def take(self, keys: NDArray[np.uint16]) -> NDArray[np.int32]:
        """A number for each key."""
        order, groups = _groups(keys)
        numbers = np.empty(len(keys), np.int32)
        for key, start, end in groups:
            shift, low = _shift(key), 0
            if shift:
                low = self._coder.decode(_uniform(1 << shift), end - start)
            some = self._coder.decode(_model(key), end - start) - _MOST
            far = np.flatnonzero(np.abs(some) == _MOST)
            if len(far) > len(self._beyond):
                raise ValueError(f"{len(far)} numbers lie beyond, {len(self._beyond)} came")
            more, self._beyond = self._beyond[: len(far)], self._beyond[len(far) :]
            if (more > FARTHEST).any():
                raise ValueError(f"a number lies {more.max()} beyond")
            some[far] += np.sign(some[far]) * more.astype(np.int32)
            numbers[start:end] = (some << shift) + low - (1 << shift >> 1) if shift else some
        out = np.empty_like(numbers)
        out[order] = numbers
        return out

    def end(self) -> None:
        """`ValueError` if more came than was taken."""
        if len(self._beyond) or not self._coder.is_empty():
            raise ValueError("more was coded than was asked for")


def _groups(
    keys: NDArray[np.uint16],
) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
    """The order by key, and where each key begins and ends in it."""
    order = np.argsort(keys, kind="stable")
    counts = np.bincount(keys)
    ends = np.cumsum(counts)
    groups = [(int(k), int(ends[k] - counts[k]), int(ends[k])) for k in np.flatnonzero(counts)]
    return order, groups


def _shift(key: int) -> int:
    """Lowest bits of this class's numbers, which are as good as uniform."""
    return max(0, (key // PHASES + _NARROWEST - 8 + 3) // 4)


@cache
def _uniform(size: int) -> Any:
    return constriction.stream.model.Uniform(size)


@cache
def _model(key: int) -> Any:
    """The distribution of a class and phase."""
    number, phase = divmod(key, PHASES)
    width = _power(number + _NARROWEST) / (1 << _shift(key))
    offset = (phase + 0.5) / PHASES - 0.5
    edges = [(n - _MOST - 0.5 + offset) / width for n in range(_ALPHABET + 1)]
    below = [0.0, *map(_below, edges[1:-1]), 1.0]
    shares = [max(b - a, _FLOOR) for a, b in pairwise(below)]
    return constriction.stream.model.Categorical(
        np.array(shares, np.float64).astype(np.float32), perfect=False
    )


def _below(value: float) -> float:
    """The share of a t distribution of standard deviation 1 that lies below a value."""
    square = value * value * _FREEDOM / (_FREEDOM - 2)
    cosine, term, total = _FREEDOM / (_FREEDOM + square), 1.0, 1.0
    for j in range(1, _FREEDOM // 2):
        term *= cosine * (2 * j - 1) / (2 * j)
        total += term
    sine = math.sqrt(square / (_FREEDOM + square))
    return 0.5 + math.copysign(0.5 * sine * total, value)


def _power(quarters: int) -> float:
    """2**(quarters / 4)."""
    whole, rest = divmod(quarters, 4)
    half = math.sqrt(2.0)
    return math.ldexp((1.0, math.sqrt(half), half, half * math.sqrt(half))[rest], whole)
