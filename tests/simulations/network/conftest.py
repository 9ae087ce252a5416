"""A server to talk to through a relay."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Return a socket that listens on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        yield listening


@pytest.fixture
def echo(server: socket.socket) -> str:
    """Return the address of a server that says whatever it hears, to one client."""

    def serve() -> None:
        client, _ = server.accept()
        with client:
            while data := client.recv(2**16):
                client.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return address(server)


def address(listening: socket.socket) -> str:
    """host:port of a socket."""
    host, port = listening.getsockname()
    return f"{host}:{port}"
