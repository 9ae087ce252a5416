"""generation behind an event loop: in threads, let in by the gate, ended when its client is gone"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from simulations.api.answers import Delta, answer
from simulations.api.gate import Gate
from simulations.api.jobs import Job
from simulations.talk.speaker import Speaker

T = TypeVar("T")


class Gone(Exception):
    """The client went away before its answer was there."""


class Runner:
    """Answers jobs, so many at once."""

    def __init__(self, speaker: Speaker, *, parallel: int, queue: int) -> None:
        self._speaker, self.gate = speaker, Gate(parallel, queue)
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="answer")
        self._going: set[threading.Event] = set()

    async def deltas(self, job: Job) -> AsyncGenerator[Delta]:
        """Answer a job. Whoever stops reading ends it, after the token that is being made.

        Its place is free again once its thread has ended, not before.
        """
        await self.gate.enter()
        cancelled, loop = threading.Event(), asyncio.get_running_loop()
        heard: asyncio.Queue[Delta | None] = asyncio.Queue()

        def tell(delta: Delta | None) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, delta)

        def work() -> None:
            try:
                for delta in answer(self._speaker, job, cancelled):
                    tell(delta)
            finally:
                tell(None)

        future = loop.run_in_executor(self._pool, work)
        future.add_done_callback(lambda _: self._ended(cancelled))
        self._going.add(cancelled)
        try:
            while (delta := await heard.get()) is not None:
                yield delta
            await future  # raises what the thread raised
        finally:
            cancelled.set()

    def _ended(self, cancelled: threading.Event) -> None:
        self._going.discard(cancelled)
        self.gate.leave()

    def close(self) -> None:
        """End all answers, and wait for their threads."""
        for cancelled in tuple(self._going):
            cancelled.set()
        self._pool.shutdown(cancel_futures=True)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for work, but not longer than its client does.

    Raises
    ------
    Gone
        If the client closed its connection; the work is cancelled.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
