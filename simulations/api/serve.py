"""the server: uvicorn on one address, until it is told to end"""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from simulations.api.app import Access, make_app
from simulations.api.keys import demand_key
from simulations.api.running import Runner
from simulations.talk.speaker import Speaker


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where and how a model is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    parallel: int = 4
    queue: int = 16
    access: Access = field(default_factory=Access)
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        demand_key(self.host, self.access.key)
        if bool(self.certificate) != bool(self.private_key):
            raise ValueError("--tls-certificate and --tls-key belong together; give both")


def address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT, :PORT or PORT."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"--bind {text}: is to be HOST:PORT, as 127.0.0.1:8000; port 0 finds one")
    return host.strip("[]") or "127.0.0.1", int(port)


class Server:
    """One model behind one address."""

    def __init__(self, speaker: Speaker, settings: Settings, listening: socket.socket) -> None:
        self._settings, self._speaker, self._socket = settings, speaker, listening
        runner = Runner(speaker, parallel=settings.parallel, queue=settings.queue)
        config = uvicorn.Config(
            make_app(speaker, runner, settings.access),
            log_level="warning",
            access_log=False,
            server_header=False,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.private_key,
            timeout_graceful_shutdown=5,
        )
        self._uvicorn = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """Where OpenAI's clients find it: their `base_url`."""
        host, port = self._socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"http{'s' if self._settings.certificate else ''}://{shown}:{port}/v1"

    def curl(self) -> str:
        """Return a line for a shell that asks for an answer."""
        body = {"model": self._speaker.name, "max_tokens": 32}
        asked = {**body, "messages": [{"role": "user", "content": "Hello"}]}
        key = ["-H", "Authorization: Bearer $GRAFT_API_KEY"] if self._settings.access.key else []
        words = ["-H", "Content-Type: application/json", "-d", json.dumps(asked)]
        quoted = [f'"{word}"' if "$" in word else shlex.quote(word) for word in [*key, *words]]
        return f"curl {self.url}/chat/completions {' '.join(quoted)}"

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        self._uvicorn.run(sockets=[self._socket])

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve in a thread, for as long as the context lasts; yields the URL."""
        thread = threading.Thread(target=self.run, daemon=True)
        thread.start()
        while not self._uvicorn.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield self.url
        finally:
            self._uvicorn.should_exit = True
            thread.join()


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before a model is loaded for it."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except OSError as error:
        raise ValueError(
            f"--bind {host}:{port}: nothing can listen there ({error.strerror or error}); choose "
            "an address of this machine and a free port, or port 0"
        ) from error
    return listening
