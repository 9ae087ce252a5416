"""Numbers as a line of text: sparklines, bars, durations, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

LEVELS = "▁▂▃▄▅▆▇█"


def spark(values: Sequence[float], width: int) -> str:
    """Return a line of at most `width` characters; each is the mean of its share of the values."""
    means = [sum(part) / len(part) for part in _parts(values, width)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = (high - low) or 1.0
    return "".join(LEVELS[round((mean - low) / span * (len(LEVELS) - 1))] for mean in means)


def _parts(values: Sequence[float], width: int) -> list[Sequence[float]]:
    """The values in order, in at most `width` parts of about equal size."""
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)] if count else [0]
    return [values[first:last] for first, last in pairwise(edges)]


def bar(share: float, width: int) -> str:
    """Return a bar that is filled to a share in [0, 1]."""
    filled = round(max(0.0, min(1.0, share)) * width)
    return "━" * filled + "─" * (width - filled)


def duration(seconds: float | None) -> str:
    """Return seconds as `12 s`, `3:05` or `2:03:05`; a dash for none."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def size(count: float) -> str:
    """Return bytes as `120 kB`, `1.2 MB` or `3.4 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def megabytes(value: float | None) -> str:
    """Return MB as MB or GB; a dash for none."""
    if value is None:
        return "-"
    return f"{value / 1024:.1f} GB" if value >= 1024 else f"{value:.0f} MB"
