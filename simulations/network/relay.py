"""A TCP relay that delays and limits what passes: a slow network on this machine, without root."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from conf.rules import split_address

QUEUE_SECONDS = 0.01
"""What a direction takes in before its link is free, as the buffer of a network's interface."""
CHUNK_SECONDS = 0.001
"""What travels in one piece, as a share of the bandwidth; small pieces cost this machine's time."""
LEAST_CHUNK, MOST_CHUNK = 1500, 2**18
MOST_HELD = 2**26
"""Bytes that a direction without a bandwidth holds at most."""
SOCKET_BUFFER = 2**18
"""Bytes that the kernel may hold before and after it; more would hide a slow network."""
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network between two hosts, the same in both directions."""

    rtt: float = 0.0
    """Round trip, seconds: half of it each way."""
    bandwidth: float | None = None
    """Bits a second, each way; None: whatever this machine can."""
    jitter: float = 0.0
    """Most that a piece is late, seconds each way, drawn evenly; order stays."""
    seed: int = 0
    """Of the jitter."""


class _Line:
    """One direction: bytes leave one after the other, and arrive after the latency."""

    def __init__(self, network: Network, seed: int) -> None:
        rate = (network.bandwidth or 0.0) / 8
        self._seconds_per_byte = 1 / rate if rate else 0.0
        self._latency, self._jitter = network.rtt / 2, network.jitter
        self._chance = random.Random(seed)
        self._free, self._lock = 0.0, threading.Lock()
        self.chunk = min(max(int(rate * CHUNK_SECONDS), LEAST_CHUNK), MOST_CHUNK)
        self.room = int(rate * (self._latency + self._jitter + QUEUE_SECONDS)) + 4 * self.chunk
        if not rate:
            self.chunk, self.room = MOST_CHUNK, MOST_HELD
        self.bytes = 0

    def arrival(self, size: int) -> float:
        """When a piece arrives that is handed in now; `time.monotonic` seconds."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size * self._seconds_per_byte
            self.bytes += size
            late = self._chance.uniform(0, self._jitter) if self._jitter else 0.0
            return self._free + self._latency + late


class _Pipe:
    """What is under way from one socket to another: a thread takes it in, another hands it out."""

    def __init__(
        self, line: _Line, source: socket.socket, sink: socket.socket, broken: Callable[[], None]
    ) -> None:
        self._line, self._source, self._sink, self._broken = line, source, sink, broken
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._held, self._changed, self._gone = 0, threading.Condition(), False
        self.threads = [
            threading.Thread(target=self._until_broken, args=(work,), daemon=True, name="relay")
            for work in (self._take, self._hand)
        ]

    def abandon(self) -> None:
        """Wake both threads; whatever is under way is lost, as with a cable that is cut."""
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _until_broken(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            self._broken()

    def _take(self) -> None:
        data = b"begin"
        while data:
            with self._changed:  # a full network takes nothing, and the sender has to wait
                self._changed.wait_for(lambda: self._held < self._line.room or self._gone)
            if self._gone:
                return
            data = self._source.recv(self._line.chunk)
            due = self._line.arrival(len(data))
            with self._changed:
                self._under_way.append((due, data))
                self._held += len(data)
                self._changed.notify_all()

    def _hand(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._under_way or self._gone)
                if self._gone:
                    return
                due, data = self._under_way[0]
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            if not data:  # the other side said its last word, and may still listen
                self._sink.shutdown(socket.SHUT_WR)
                return
            self._sink.sendall(data)
            with self._changed:
                self._under_way.popleft()
                self._held -= len(data)
                self._changed.notify_all()


class _Passing:
    """One connection that is passed on, from its acceptance until both sides have closed."""

    def __init__(self, near: socket.socket, to: tuple[str, int], up: _Line, down: _Line) -> None:
        self._near, self._to, self._lines = near, to, (up, down)
        self._sockets, self._pipes, self._cut = [near], list[_Pipe](), False

    def run(self) -> None:
        """Pass on until the end; whoever finds nobody there sees the connection end."""
        try:
            far = _connect(self._to)
        except OSError:
            self._near.close()
            return
        self._sockets.append(far)
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        (up, down), near = self._lines, self._near
        self._pipes += [_Pipe(up, near, far, self.cut), _Pipe(down, far, near, self.cut)]
        threads = [thread for pipe in self._pipes for thread in pipe.threads]
        for thread in threads:
            thread.start()
        if self._cut:  # before there was anything to cut
            self.cut()
        for thread in threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def cut(self) -> None:
        """End it at once, in both directions."""
        self._cut = True
        for pipe in self._pipes:
            pipe.abandon()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes whoever waits on it


def _connect(to: tuple[str, int]) -> socket.socket:
    """A connection whose buffer is small from the beginning, which `create_connection` cannot."""
    trouble: OSError = OSError(f"{to[0]} has no address")
    for family, kind, number, _, address in socket.getaddrinfo(*to, type=socket.SOCK_STREAM):
        far = socket.socket(family, kind, number)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        far.settimeout(CONNECT_SECONDS)
        try:
            far.connect(address)
        except OSError as error:
            far.close()
            trouble = error
        else:
            far.settimeout(None)
            return far
    raise trouble


class Relay:
    """Listens at one address and passes every connection on to another, over one network.

    All connections share the bandwidth. Neither loss nor slow start is modelled: each half of a
    connection is this machine's own TCP, and what is between them is a pipe of the given latency
    that takes no more than it has room for.

    Parameters
    ----------
    to : str
        Where connections are passed on to, host:port; it need not listen yet.
    network : Network
        What they meet on the way.
    listen : str
        Where they are taken, host:port; port 0 is any free one.

    Raises
    ------
    OSError
        If nobody can listen there.
    """

    def __init__(self, to: str, network: Network, listen: str = "127.0.0.1:0") -> None:
        self._to = split_address(to)
        host, port = split_address(listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        # Accepted sockets inherit it.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._listener.getsockname()[1]}"
        self._up, self._down = _Line(network, network.seed), _Line(network, network.seed + 1)
        self._connections: dict[threading.Thread, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._listening = threading.Thread(target=self._accept, daemon=True, name="relay")
        self._listening.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bytes_up(self) -> int:
        """Bytes taken in from those who connected."""
        return self._up.bytes

    @property
    def bytes_down(self) -> int:
        """Bytes taken in from where they connected to."""
        return self._down.bytes

    def sever(self) -> None:
        """Cut all connections at once; new ones are taken."""
        with self._lock:
            for cut in self._connections.values():
                cut()

    def close(self) -> None:
        """Listen no more, and cut all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._listening.join()
        self.sever()
        for thread in list(self._connections):
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            passing = _Passing(near, self._to, self._up, self._down)
            thread = threading.Thread(target=self._pass_on, args=(passing,), daemon=True)
            with self._lock:
                self._connections[thread] = passing.cut
            thread.start()

    def _pass_on(self, passing: _Passing) -> None:
        passing.run()
        with self._lock:
            del self._connections[threading.current_thread()]


def serve(pipe: Connection, to: str, network: Network, listen: str = "127.0.0.1:0") -> None:
    """Run a relay until the pipe ends: what `simulations.bench.worker` runs in its own process.

    Parameters
    ----------
    pipe : Connection
        Is sent the address, and after whatever it brings, the bytes up and down so far.
    to, network, listen : str, Network, str
        As of `Relay`.
    """
    with Relay(to, network, listen) as relay, contextlib.suppress(EOFError):
        pipe.send(relay.address)
        while True:
            pipe.recv()
            pipe.send((relay.bytes_up, relay.bytes_down))
