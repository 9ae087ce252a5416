"""Entropy coding: every number comes back, at about what it must take, and the bytes are one."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from numpy.typing import NDArray

from strategies.transport.codec.entropy import FARTHEST, PHASES, Reader, Writer, class_keys

CLASSES = range(-16, 41, 4)


def normal(class_number: int, count: int = 20_000) -> NDArray[np.int32]:
    """Numbers of about a class."""
    chance = np.random.default_rng(class_number + 99)
    return np.rint(chance.normal(size=count) * 2 ** (class_number / 4)).astype(np.int32)


def coded(numbers: NDArray[np.int32], keys: NDArray[np.uint16]) -> memoryview:
    writer = Writer()
    writer.put(numbers, keys)
    return memoryview(writer.data())


@pytest.mark.parametrize("class_number", CLASSES)
def test_numbers_take_what_their_entropy_says(class_number: int) -> None:
    numbers = normal(class_number)
    keys = class_keys(np.full(len(numbers), class_number))
    data = coded(numbers, keys)
    reader = Reader(data)

    assert (reader.take(keys) == numbers).all()
    reader.end()
    _, counts = np.unique(numbers, return_counts=True)
    entropy = -(counts * np.log2(counts / len(numbers))).sum()
    assert 8 * len(data) < 1.03 * entropy + 128


def test_any_number_may_come_in_any_class_and_phase() -> None:
    numbers = np.array([0, 1, -1, 39, 40, -40, 41, 10**5, -FARTHEST, FARTHEST], np.int32)
    for class_number in (-99, *CLASSES, 99):
        for phase in range(PHASES):
            keys = class_keys(np.full(len(numbers), class_number), phase)
            reader = Reader(coded(numbers, keys))
            assert (reader.take(keys) == numbers).all()
            reader.end()


def test_a_known_dither_saves_bits() -> None:
    chance = np.random.default_rng(0)
    values, dither = chance.normal(size=50_000) * 0.7, chance.random(50_000)
    numbers = np.rint(values - (dither - 0.5)).astype(np.int32)
    classes = np.full(50_000, -2)
    told = len(coded(numbers, class_keys(classes, (dither * PHASES).astype(np.int32))))
    assert told < 0.96 * len(coded(numbers, class_keys(classes)))


def test_the_bytes_are_the_same_on_every_machine() -> None:
    """Both sides make the probabilities themselves: whoever changes them changes the wire."""
    chance = np.random.default_rng(0)
    classes = np.repeat(np.arange(-16, 41), 40)
    numbers = chance.integers(-(2**16), 2**16, len(classes)) >> (16 - classes // 4)
    data = coded(numbers.astype(np.int32), class_keys(classes, np.arange(len(classes)) % PHASES))
    assert (len(data), sum(data), bytes(data[-16:]).hex()) == (
        1592,
        202368,
        "bee6b9bf24f58c39132c23e2bbc39902",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "0 bytes are no entropy-coded words"),
        ([2, 1], "2 words are coded, 1 came"),
        ([1, 0], "the last word is zero"),
        ([2, 1, 2, 3], "more was coded than was asked for"),
        ([2**32 - 1], "4294967295 words are coded, 0 came"),
    ],
)
def test_what_is_no_code_is_refused(words: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader = Reader(memoryview(np.array(words, "<u4").tobytes()))
        reader.take(class_keys(np.full(3, 0)))
        reader.end()


def test_escapes_are_bounded_and_must_be_there() -> None:
    keys = class_keys(np.zeros(1, np.int32))
    words = np.frombuffer(coded(np.array([50], np.int32), keys), "<u4")
    for last, message in (
        ([], "1 numbers lie beyond, 0 came"),
        ([2**31], "lies 2147483648 beyond"),
    ):
        data = np.array([*words[:-1], *last], "<u4").tobytes()
        with pytest.raises(ValueError, match=message):
            Reader(memoryview(data)).take(keys)


def test_noise_is_read_or_refused() -> None:
    chance = np.random.default_rng(0)
    for length in (*range(1, 30), 400):
        words = chance.integers(0, 2**32, length)
        words[0] = min(words[0], length - 1) if length % 2 else length - 1
        keys = class_keys(chance.integers(-16, 41, 500).astype(np.int32))
        with suppress(ValueError):
            assert len(Reader(memoryview(words.astype("<u4").tobytes())).take(keys)) == 500
