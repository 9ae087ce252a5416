"""What a trunk tells of its work to whoever keeps metrics of it; this one keeps none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

_NOTHING: AbstractContextManager[Any] = nullcontext()


class Meter:
    """Told from the sessions' threads, at once; whatever takes long here holds a client up."""

    def opened(self) -> None:
        """A session was opened."""

    def work(self, kind: str, tokens: int = 0) -> AbstractContextManager[Any]:
        """Around a `forward` (of so many tokens), `backward` or `step` of the trunk alone."""
        return _NOTHING

    def frame(self, verb: str) -> AbstractContextManager[Any]:
        """Around the answer to a frame, with whatever it waits for."""
        return _NOTHING

    def received(self, size: int) -> None:
        """Bytes came from a client."""

    def sent(self, size: int) -> None:
        """Bytes go to a client."""

    def failed(self, kind: str) -> None:
        """A frame could not be served; `kind` as in `TrunkError`."""

    def connected(self, *, again: bool) -> None:
        """A client was let in, perhaps after its stream had broken."""

    def refused(self) -> None:
        """Somebody without a token that holds was not let in."""


SILENT = Meter()
