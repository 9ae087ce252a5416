"""Small whole numbers, of so many bits each, packed without gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed_size(count: int, bits: int) -> int:
    """Bytes that so many numbers take."""
    return count if bits == 8 else bits * ((count + 7) // 8)


def pack_bits(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack numbers below 2**bits: first the lowest bit of all of them, then the next."""
    if bits == 8:
        return numbers
    return np.concatenate([np.packbits(numbers >> bit & 1) for bit in range(bits)])


def unpack_bits(data: memoryview, count: int, bits: int) -> NDArray[np.uint8]:
    """The numbers of `pack_bits`, out of as many bytes as `packed_size` says."""
    planes = np.frombuffer(data, np.uint8)
    if bits == 8:
        return planes
    numbers = np.zeros(count, np.uint8)
    for bit, plane in enumerate(planes.reshape(bits, -1)):
        numbers |= np.unpackbits(plane, count=count) << bit
    return numbers
