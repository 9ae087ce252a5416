"""What can be wrong with a tensor's message, so that it does not hold together."""

from __future__ import annotations

import random
from collections.abc import Callable

from strategies.transport import trunk_pb2 as pb

MOST = 2**32 - 1
COUNTS = (0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, MOST)


def _wrong_shape(message: pb.Tensor, chance: random.Random) -> None:
    del message.shape[:]
    dims = chance.choice((0, 1, 2, 3, 3, 3, 4, 5, 3000))
    message.shape.extend(chance.choice(COUNTS) for _ in range(dims))


def _one_wrong_dimension(message: pb.Tensor, chance: random.Random) -> None:
    if message.shape:
        message.shape[chance.randrange(len(message.shape))] = chance.choice(COUNTS)


def _wrong_type(message: pb.Tensor, chance: random.Random) -> None:
    message.codec = chance.choice(
        ("", "fp32", "bf16", "int4", "klt", "no such codec", "\0", "n" * 3000)
    )


def _wrong_place(message: pb.Tensor, chance: random.Random) -> None:
    message.offset = chance.choice((1, 4, 2**31, 2**63, 2**64 - 1))


def _wrong_length(message: pb.Tensor, chance: random.Random) -> None:
    near = (max(0, message.size - 1), min(message.size + 1, 2**64 - 1))
    message.size = chance.choice((0, 1, 4, *near, 2**64 - 1))


def much_from_little(message: pb.Tensor, chance: random.Random) -> None:
    """A shape that takes more memory than the data."""
    del message.shape[:]
    size = chance.choice((2**10, 2**14, 2**17))
    message.shape.extend(chance.choice(([8, size], [1, size, 8], [8 * size])))


WRONGS: tuple[Callable[[pb.Tensor, random.Random], None], ...] = (
    _wrong_shape,
    _one_wrong_dimension,
    _wrong_type,
    _wrong_place,
    _wrong_length,
    much_from_little,
)
"""Each does something to a message."""
