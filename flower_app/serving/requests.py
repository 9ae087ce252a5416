"""When a server is asked to end, from outside."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def asked_to_stop(*, with_parent: bool = False) -> Iterator[Callable[[], int]]:
    """Count how often the process was asked to end, by SIGINT or SIGTERM.

    Parameters
    ----------
    with_parent : bool
        The end of the standard input counts twice: whoever holds the other end is gone.
    """
    count = [0]

    def heard(*_: Any) -> None:
        count[0] += 1

    before = {each: signal.signal(each, heard) for each in (signal.SIGINT, signal.SIGTERM)}
    if with_parent:

        def wait() -> None:
            sys.stdin.buffer.read()
            count[0] += 2

        threading.Thread(target=wait, daemon=True, name="graft-parent").start()
    try:
        yield lambda: count[0]
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
