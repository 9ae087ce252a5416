"""who may be answered: so many at a time, so many waiting, and the others are told so"""

from __future__ import annotations

import asyncio

from simulations.api.errors import busy


class Gate:
    """Lets `parallel` requests through at a time, and `queue` more wait."""

    def __init__(self, parallel: int, queue: int) -> None:
        if parallel < 1 or queue < 0:
            raise ValueError(f"--parallel {parallel} is to be 1 or more, --queue {queue} 0 or more")
        self._slots, self._parallel, self._queue = asyncio.Semaphore(parallel), parallel, queue
        self.running, self.waiting = 0, 0

    async def enter(self) -> None:
        """Come in, at once or after those who wait; `leave` must follow.

        Raises
        ------
        ApiError
            429, if too many wait.
        """
        if self._slots.locked() and self.waiting >= self._queue:
            raise busy(self.running, self.waiting)
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1

    def leave(self) -> None:
        """Make room for the next."""
        self.running -= 1
        self._slots.release()
