"""Threads that a test stops where it wants, and lets go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

PATIENT = 20.0
"""Seconds after which a test that waits has failed."""


class Pause:
    """Stops the threads that run into it until the test lets them go on."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def stop(self) -> None:
        self.reached.set()
        assert self.go.wait(PATIENT), "the test never let the work go on"

    def wait(self) -> None:
        assert self.reached.wait(PATIENT), "the work never began"


def at_once(pool: ThreadPoolExecutor, call: Callable[[], Any]) -> None:
    """Done while the work stands still; a call that waits for it fails the test."""
    pool.submit(call).result(PATIENT / 4)
