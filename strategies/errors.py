"""Errors that cross the cut, as words."""

from __future__ import annotations


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
        super().__init__(message)
        self.kind = kind
