"""The next frame of a stream, read while an earlier one is at work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc

READ_AHEAD = 2
"""Frames that are read before they are asked for: one waits, and one is about to."""


class Ahead:
    """Reads a stream's frames as they come, a few before they are asked for.

    gRPC moves a large frame only while somebody reads: without this, none would cross the network
    while the trunk computes.

    Parameters
    ----------
    requests : iterator of bytes
        The stream's.
    """

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests, self._over = requests, False
        self._frames: queue.Queue[bytes | None] = queue.Queue(READ_AHEAD - 1)
        threading.Thread(target=self._read, daemon=True, name="graft-ahead").start()

    def next(self) -> bytes | None:
        """Wait for the next frame; None if the stream has ended, which no client does on its own.

        Nothing comes after that.
        """
        return self._frames.get()

    def stop(self) -> None:
        """Read no more: the stream has ended, or nobody asks."""
        self._over = True
        while True:  # the reader may wait for room
            try:
                self._frames.get_nowait()
            except queue.Empty:
                return

    def _read(self) -> None:
        raw: bytes | None = b""
        while raw is not None and not self._over:
            try:
                raw = next(self._requests, None)
            except grpc.RpcError:
                raw = None
            self._frames.put(raw)
