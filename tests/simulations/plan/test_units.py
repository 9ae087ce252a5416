"""Quantities: what is read, and what is refused with an example of what would be."""

from __future__ import annotations

import pytest

from models import Cut
from simulations.plan import units


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (units.bandwidth, "100Mbit", 1e8),
        (units.bandwidth, "1 Gbit/s", 1e9),
        (units.bandwidth, "12.5MB/s", 1e8),
        (units.latency, "50ms", 0.05),
        (units.latency, "0s", 0.0),
        (units.speed, "2T", 2e12),
        (units.speed, "500GFLOP/s", 5e11),
        (units.speed, "1.5e12", 1.5e12),
        (units.memory, "8GB", 8e9),
        (units.memory, "8GiB", 2**33),
        (units.batch, "8x512", (8, 512)),
        (units.cut, "2,1", Cut(2, 1)),
    ],
)
def test_a_quantity_is_read(read: object, text: str, value: object) -> None:
    assert read(text) == value  # type: ignore[operator]


@pytest.mark.parametrize(
    ("read", "text", "remedy"),
    [
        (units.bandwidth, "100", "100Mbit"),
        (units.bandwidth, "100Mb", "100Mbit"),
        (units.bandwidth, "0Mbit", "more than 0"),
        (units.bandwidth, "1.2.3Gbit", "1Gbit"),
        (units.latency, "50", "50ms"),
        (units.speed, "fast", "2T"),
        (units.memory, "8", "8GB"),
        (units.memory, "-8GB", "8GB"),
        (units.batch, "8", "8x512"),
        (units.batch, "8x1", "8x512"),
        (units.cut, "2", "2,1"),
    ],
)
def test_what_is_no_quantity_is_refused(read: object, text: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as refused:
        read(text)  # type: ignore[operator]
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (units.in_bytes(512), "512 B"),
        (units.in_bytes(1.234e9), "1.23 GB"),
        (units.in_bytes(999_999), "1 MB"),
        (units.in_short(2e12), "2 T"),
        (units.in_time(0.0123), "12.3 ms"),
        (units.in_time(0.9999), "1 s"),
        (units.in_time(600), "10 min"),
    ],
)
def test_a_number_is_put_into_words(words: str, value: str) -> None:
    assert words == value
