"""Errors that cross the cut, as words."""

from __future__ import annotations

PASSING = ("damaged", "stale", "missing", "gap")
"""Kinds of `TrunkError` after which a session goes on: a frame that did not arrive whole, one that
came again when its answer was seen, a question for a gradient that is not there, and a frame before
which another is missing."""


LONGEST_MESSAGE, LONGEST_KIND = 1000, 40
"""Characters of an error; it may quote what a stranger sent, and ends up in logs."""


class TrunkError(RuntimeError):
    """The trunk refused a frame, or cannot be reached. The message reaches the other side as it is.

    Parameters
    ----------
    message : str
        What happened, with the values and the remedy.
    kind : str
        A short, stable word for programs: `refused`, `shape`, `order`, `closed`, `timeout`, ...
    """

    def __init__(self, message: str, *, kind: str = "refused") -> None:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}... ({len(message)} characters)"
        super().__init__(message if message.strip() else "refused without a reason")
        self.kind = kind[:LONGEST_KIND]

    @property
    def passes(self) -> bool:
        """Whether the session goes on."""
        return self.kind in PASSING
