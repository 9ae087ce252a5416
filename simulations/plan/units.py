"""Quantities as people write them: 100Mbit, 50ms, 8x512, 2T, 8GB; and back into words."""

from __future__ import annotations

import re

from models import Cut

_PREFIXES = {
    "": 1.0,
    **{letter: 1000.0**power for power, letter in enumerate("kMGTP", 1)},
    **{f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", 1)},
}
_QUANTITY = re.compile(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([kKMGTP]i?)?\s*([A-Za-z/]*)\s*")


def bandwidth(text: str) -> float:
    """Bits a second: 100Mbit, 1Gbit/s, 12.5MB/s.

    Raises
    ------
    ValueError
        If the text is none, with examples of what is.
    """
    units = {"bit": 1.0, "bit/s": 1.0, "bps": 1.0, "B": 8.0, "B/s": 8.0}
    return _read(text, units, "bandwidth", "100Mbit, 1Gbit or 12.5MB/s")


def latency(text: str) -> float:
    """Seconds: 50ms, 0.2s, 300us; 0 is allowed."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|ms|us)\s*", text)
    if not found:
        raise ValueError(f"latency {text!r} is not a time; write 50ms, 0.2s or 300us")
    return float(found[1]) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[found[2]]


def speed(text: str) -> float:
    """Floating-point operations a second: 2T, 500G, 1.5e12, 60TFLOP/s."""
    units = dict.fromkeys(("", "FLOP", "FLOPS", "FLOP/s", "flops"), 1.0)
    return _read(text, units, "speed", "2T or 500G, in FLOP/s")


def memory(text: str) -> int:
    """Bytes: 8GB (10^9), 8GiB (2^30), 512MB."""
    return int(_read(text, {"B": 1.0}, "memory", "8GB, 8GiB or 512MB"))


def batch(text: str) -> tuple[int, int]:
    """Sequences and tokens of a micro-batch: 8x512."""
    found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
    if not found or int(found[1]) < 1 or int(found[2]) < 2:
        raise ValueError(f"batch {text!r}: write 8x512 for 8 sequences of 512 tokens (at least 2)")
    return int(found[1]), int(found[2])


def cut(text: str) -> Cut:
    """Blocks below and above the trunk: 2,1."""
    found = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if not found:
        raise ValueError(f"cut {text!r}: write 2,1 for 2 blocks below the trunk and 1 above it")
    return Cut(int(found[1]), int(found[2]))


def in_bytes(count: float) -> str:
    """Return 1.23 GB; prefixes are decimal, as networks and disks have them."""
    return f"{count:.0f} B" if count < 1000 else f"{in_short(count)}B"


def in_short(number: float) -> str:
    """Return 1.23 G, three digits."""
    for letter in "PTGMk":
        if number >= 0.9995 * _PREFIXES[letter]:
            return f"{_digits(number / _PREFIXES[letter])} {letter}"
    return f"{_digits(number)} "


def in_time(seconds: float) -> str:
    """Return 12.3 ms, 4.56 s, 3.2 min or 1.5 h."""
    if seconds < 0.9995:
        return f"{_digits(seconds * 1e3)} ms"
    if seconds < 120:
        return f"{_digits(seconds)} s"
    return f"{_digits(seconds / 60)} min" if seconds < 7200 else f"{_digits(seconds / 3600)} h"


def _digits(number: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:.3g}"


def _read(text: str, units: dict[str, float], what: str, examples: str) -> float:
    found = _QUANTITY.fullmatch(text)
    if not found or found[3] not in units:
        raise ValueError(f"{what} {text!r} cannot be read; write {examples}")
    try:
        number = float(found[1])
    except ValueError:
        raise ValueError(f"{what} {text!r} cannot be read; write {examples}") from None
    if number <= 0:
        raise ValueError(f"{what} {text!r} must be more than 0")
    prefix = found[2] or ""
    return number * _PREFIXES["k" if prefix == "K" else prefix] * units[found[3]]
