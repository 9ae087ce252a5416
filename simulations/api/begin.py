"""opens what is to be served, says where it answers, and serves it until it is ended"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simulations.api.keys import find_key, is_loopback
from simulations.talk.opening import Asked, opened

MISSING = (
    "graft api needs FastAPI and uvicorn, and {name} is not installed: pip install 'graft[api]' "
    "(in a checkout: pip install -e '.[api]')"
)


@dataclass(frozen=True, kw_only=True)
class How:
    """How the command line asks for it to be served."""

    bind: str = "127.0.0.1:8000"
    key: str = ""
    key_file: Path | None = None
    parallel: int = 4
    queue: int = 16
    origins: tuple[str, ...] = ()
    certificate: Path | None = None
    private_key: Path | None = None


def begin(asked: Asked, how: How, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; what is wrong with the settings is said before a model loads.

    Raises
    ------
    ValueError
        If settings are wrong, nothing can listen there, or the extra is not installed.
    """
    try:
        from simulations.api.app import Access
        from simulations.api.serve import Server, Settings, address, listen
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise ValueError(MISSING.format(name=error.name)) from error
    host, port = address(how.bind)
    settings = Settings(
        host=host,
        port=port,
        parallel=how.parallel,
        queue=how.queue,
        access=Access(key=find_key(how.key, how.key_file, os.environ), origins=how.origins),
        certificate=how.certificate,
        private_key=how.private_key,
    )
    with listen(host, port) as listening, opened(asked) as speaker:
        server = Server(speaker, settings, listening)
        say(f"{speaker.name} answers at {server.url} ({_who(settings.access.key, host)})")
        if not is_loopback(host) and not how.certificate:
            say("warning: keys and texts cross the network in the clear; see --tls-certificate")
        say(f"try:  {server.curl()}")
        say("Ctrl-C ends it")
        server.run()


def _who(key: str, host: str) -> str:
    if key:
        return "for whoever has the API key"
    assert is_loopback(host), host
    return "on this machine only"
