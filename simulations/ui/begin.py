"""Opens what the page talks to, serves it until Ctrl-C, and says where it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from getpass import getpass
from importlib.util import find_spec
from pathlib import Path

from flower_app.runs.folders import FINISHED, model_of, read_summaries
from flower_app.serving.client import Joined
from flower_app.serving.source import find_served
from models import Cut
from simulations.talk.opening import Asked, joined, speaker_of
from simulations.ui.bind import listen, password_for, read_bind
from simulations.ui.chats import Chats
from simulations.ui.shelf import Shelf
from simulations.ui.talked import Load, Talked

NEEDED = ("gradio", "fastapi", "uvicorn")


@dataclass(frozen=True, kw_only=True)
class What:
    """What is to be talked to, as the user names it."""

    source: str = ""
    """A run, a model, an adapter or a folder of parts; empty: the newest run with a model."""
    cut: Cut | None = None
    access: Path | None = None
    """The access file of a trunk that is served; None: one of our own is started."""
    ends: str = ""
    """Where bottom and top are, if not in the source."""


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where the page is to be had, and by whom."""

    bind: str
    user: str
    password: str | None


def begin(what: What, door: Door, say: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `say` prints a line."""
    check_installed(find_spec)
    from simulations.ui import page, server

    where = read_bind(door.bind)
    word = password_for(where, door.password, _ask if sys.stdin.isatty() else None)
    listening = listen(where)
    with listening, opened(what) as talked:
        built = page.build(talked, Chats(), Shelf())
        app = server.make(built, loopback=where.loopback, user=door.user, password=word)
        port = listening.getsockname()[1]
        say(f"http://{where.shown}:{port}")
        say(f"user {door.user}, with the password" if word else "on this machine only")
        say("Ctrl-C ends it")
        server.serve(app, listening).run(sockets=[listening])


def check_installed(find: Callable[[str], object | None]) -> None:
    """Say in words what is missing, if something is; `find` looks a package up."""
    if missing := [name for name in NEEDED if find(name) is None]:
        raise ValueError(
            f"graft ui needs {' and '.join(missing)}, not installed: pip install 'graft[ui]'"
        )


def newest() -> str:
    """Return the newest finished run that has a model; empty if there is none."""
    ended = [run for run, told in read_summaries() if told["status"] == FINISHED]
    return next((str(run) for run in reversed(ended) if model_of(run) is not None), "")


@contextmanager
def opened(what: What) -> Iterator[Talked | None]:
    """Open what the page talks to; None if there is nothing yet."""
    source = what.source or ("" if what.access or what.ends else newest())
    if not (source or what.access or what.ends):
        yield None
        return
    asked = Asked(source=source, cut=what.cut, access=what.access, ends=what.ends)
    with joined(asked) as found:
        yield _split(found, asked)


def _split(joined: Joined, asked: Asked) -> Talked:
    def load() -> Load:
        sessions, taken, queued = joined.trunk.load()
        return Load(sessions=sessions, kv_mib=taken / 2**20, queued=queued)

    served = find_served(asked.ends or asked.source, joined.model.graft_ends[0].cut)
    return Talked(
        speaker=speaker_of(joined, asked),
        description=f"{served.description}; cut {served.cut.bottom} + {served.cut.top}",
        trunk=joined.trunk.address,
        load=load,
    )


def _ask() -> str:
    return getpass("Password for the page: ")
