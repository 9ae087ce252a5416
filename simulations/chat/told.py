"""What answers took, in words."""

from __future__ import annotations

from simulations.talk.stats import Figures


def told(figures: Figures) -> list[str]:
    """Return what answers took, a line for each side of it."""
    if not figures.tokens:
        return ["no tokens yet"]
    lines = [
        f"{_counted(figures.answers, 'answer')}, {_counted(figures.tokens, 'token')}: "
        f"{figures.rate:,.1f} tokens/s, {figures.ms:,.1f} ms a token; the first after "
        f"{figures.first / max(figures.answers, 1):.2f} s",
        f"prompts of {_counted(figures.prompt, 'token')}, {figures.reused:,} of them still in the "
        "cache",
    ]
    if figures.parts:
        shares = ", ".join(f"{name} {each:,.1f}" for name, each in figures.ms_of.items())
        rest = figures.ms - sum(figures.ms_of.values())
        up, down = figures.bytes_each
        lines += [
            f"ms a token: {shares}, drawing and text {rest:,.1f}",
            f"bytes for each token through the trunk: {up:,.0f} up, {down:,.0f} down "
            f"({_counted(figures.trips, 'round trip')}, {figures.each_trip:.1f} tokens in each)",
        ]
    return lines


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
