"""opens what is to be served, says where it answers, and serves it until it is ended"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flower_app.serving.source import find_served, load_tokenizer, load_whole_model
from models import Cut
from simulations.api.keys import find_key, is_loopback
from simulations.talk.speaker import Speaker

MISSING = (
    "graft api needs FastAPI and uvicorn, and {name} is not installed: pip install 'graft[api]' "
    "(in a checkout: pip install -e '.[api]')"
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for."""

    source: str
    cut: Cut | None = None
    bind: str = "127.0.0.1:8000"
    key: str = ""
    key_file: Path | None = None
    parallel: int = 4
    queue: int = 16
    origins: tuple[str, ...] = ()
    certificate: Path | None = None
    private_key: Path | None = None


def begin(asked: Asked, say: Callable[[str], None]) -> None:
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
    host, port = address(asked.bind)
    settings = Settings(
        host=host,
        port=port,
        parallel=asked.parallel,
        queue=asked.queue,
        access=Access(key=find_key(asked.key, asked.key_file, os.environ), origins=asked.origins),
        certificate=asked.certificate,
        private_key=asked.private_key,
    )
    with listen(host, port) as listening, _speaker(asked) as speaker:
        server = Server(speaker, settings, listening)
        say(f"{speaker.name} answers at {server.url} ({_who(settings.access.key, host)})")
        if not is_loopback(host) and not asked.certificate:
            say("warning: keys and texts cross the network in the clear; see --tls-certificate")
        say(f"try:  {server.curl()}")
        say("Ctrl-C ends it")
        server.run()


def _who(key: str, host: str) -> str:
    if key:
        return "for whoever has the API key"
    assert is_loopback(host), host
    return "on this machine only"


@contextmanager
def _speaker(asked: Asked) -> Iterator[Speaker]:
    served = find_served(asked.source, asked.cut)
    yield Speaker(load_whole_model(served), load_tokenizer(served), served.name)
