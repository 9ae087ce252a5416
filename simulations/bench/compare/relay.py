"""A slow line: TCP connections are forwarded at a given bandwidth, each way for itself."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

CHUNK = 2**15
"""Bytes that are forwarded at once: 2.6 ms at 100 Mbit/s."""


class Relay:
    """Listens on a free port of the loopback and forwards to an address; a context manager.

    Parameters
    ----------
    target : str
        ``host:port``.
    bandwidth : float
        Bits per second of each connection and direction.
    """

    def __init__(self, target: str, bandwidth: float) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._seconds_a_byte = (host, int(port)), 8 / bandwidth
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._open: list[socket.socket] = []

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for each in (self._server, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        free = 0.0
        with contextlib.suppress(OSError):  # either end hung up
            while data := source.recv(CHUNK):
                free = max(free, time.perf_counter()) + len(data) * self._seconds_a_byte
                time.sleep(max(0.0, free - time.perf_counter()))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
