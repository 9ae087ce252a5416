"""Traces of trained ends in a process's memory: their very bytes, in any number format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.aggregate.masked import FRACTION_BITS

Bytes = NDArray[np.uint8]
State = Mapping[str, Tensor]

PIECE = 16
"""Bytes that do not occur by chance."""
NO_CHANCE = 2**16
"""Integers that are smaller occur by chance."""
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Learned:
    """What one client made of a round's start, or the mean of all, and its weight."""

    start: State
    end: State
    weight: int


def with_means(rounds: Sequence[Sequence[tuple[State, int]]], first: State) -> list[Learned]:
    """What each client learned in each round, by its ends and weight, and what their mean did."""
    found, start = [], first
    for answers in rounds:
        total = sum(weight for _, weight in answers)
        mean = {
            name: torch.stack([w / total * end[name].double() for end, w in answers]).sum(0).float()
            for name in start
        }
        found += [Learned(start, end, weight) for end, weight in [*answers, (mean, total)]]
        start = mean
    return found


def traces(memory: Bytes, learned: Sequence[Learned]) -> dict[str, int]:
    """How many pieces of ends, and of what they have learned, lie in memory, at any place.

    Each as it is and times its weight, as floats of four kinds; ends also in fixed point.
    """
    pieces = dict(piece for each in learned for piece in _pieces_of(each))
    firsts = np.unique(np.frombuffer(b"".join(pieces), "<u8")[::2])
    found: dict[str, int] = {}
    for place in _places(memory, firsts):
        if what := pieces.get(memory[place : place + PIECE].tobytes()):
            found[what] = found.get(what, 0) + 1
    return found


def _pieces_of(one: Learned) -> Iterator[tuple[bytes, str]]:
    for name, tensor in one.end.items():
        start, end = one.start[name].double().reshape(-1), tensor.double().reshape(-1)
        for weight in (1, one.weight):
            for kind in FLOATS:
                old, new = (weight * start).to(kind), (weight * end).to(kind)
                yield from _pieces(new, old != new, "ends")
                yield from _pieces((weight * (end - start)).to(kind), old != new, "update")
            scale = weight * 2.0**FRACTION_BITS
            old, new = ((scale * each).round().long() for each in (start, end))
            yield from _pieces(new, (old != new) & (new.abs() > NO_CHANCE), "ends")


def _pieces(values: Tensor, telling: Tensor, what: str) -> Iterator[tuple[bytes, str]]:
    """Values in pieces, but for those that also tell of something else."""
    each = PIECE // values.element_size()
    count = len(values) // each
    cut, telling = (t[: count * each].reshape(count, each) for t in (values, telling))
    what = f"{what}, {str(values.dtype).removeprefix('torch.')}"
    for row in cut[telling.all(1)].view(torch.uint8).numpy():
        yield row.tobytes(), what


def _places(memory: Bytes, firsts: NDArray[np.uint64]) -> Iterator[int]:
    """Where memory has one of these words of 8 bytes."""
    known = np.zeros(2**24, bool)
    known[_hashed(firsts)] = True
    for shift in range(8):
        words = memory[shift : shift + (len(memory) - shift) // 8 * 8].view("<u8")
        likely = np.flatnonzero(known[_hashed(words)])
        nearest = firsts[np.searchsorted(firsts[:-1], words[likely])]
        yield from (shift + 8 * likely[nearest == words[likely]]).tolist()


def _hashed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
