"""Opens what the page talks to, serves it until Ctrl-C, and says where it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from getpass import getpass

from flower_app.runs.folders import FINISHED, model_of, read_summaries
from flower_app.serving.source import find_served, load_tokenizer, load_whole_model
from models import Cut
from simulations.talk.speaker import Speaker
from simulations.ui.bind import listen, password_for, read_bind
from simulations.ui.chats import Chats
from simulations.ui.shelf import Shelf
from simulations.ui.talked import Talked

MISSING = (
    "graft ui needs Gradio, which is not installed: pip install 'graft[ui]' (in a checkout: "
    "pip install -e '.[ui]')"
)


def begin(
    source: str,
    *,
    cut: Cut | None,
    bind: str,
    user: str,
    password: str | None,
    say: Callable[[str], None],
) -> None:
    """Serve the page until it is interrupted.

    Parameters
    ----------
    source : str
        A run, a model, an adapter or a folder of parts; empty: the newest run with a model.
    say : callable
        Prints a line.
    """
    try:
        from simulations.ui import page, server
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "uvicorn", "fastapi"):
            raise
        raise ValueError(MISSING) from error
    where = read_bind(bind)
    word = password_for(where, password, _ask if sys.stdin.isatty() else None)
    listening = listen(where)
    with listening, _talked(source or newest(), cut) as talked:
        built = page.build(talked, Chats(), Shelf())
        app = server.make(built, loopback=where.loopback, user=user, password=word)
        port = listening.getsockname()[1]
        say(f"http://{where.shown}:{port}")
        say(f"user {user}, with the password" if word else "on this machine only")
        say("Ctrl-C ends it")
        server.serve(app, listening).run(sockets=[listening])


def newest() -> str:
    """Return the newest finished run that has a model; empty if there is none."""
    ended = [run for run, told in read_summaries() if told["status"] == FINISHED]
    return next((str(run) for run in reversed(ended) if model_of(run) is not None), "")


@contextmanager
def _talked(source: str, cut: Cut | None) -> Iterator[Talked | None]:
    """What the page talks to, until it ends."""
    if not source:
        yield None
        return
    served = find_served(source, cut)
    speaker = Speaker(load_whole_model(served), load_tokenizer(served), served.name)
    yield Talked(speaker=speaker, description=served.description)


def _ask() -> str:
    return getpass("Password for the page: ")
