"""What is to talk, found and loaded by what the user named, with its trunk elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flower_app.serving.client import Joined, connect
from flower_app.serving.local import open_local
from flower_app.serving.source import find_served
from models import Cut
from simulations.talk.speaker import Speaker
from simulations.talk.speculate import bridge_folders, speculation


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user named."""

    source: str = ""
    """A run, a model, an adapter or a folder of parts (`find_served`)."""
    cut: Cut | None = None
    """Of a model that does not say where it is cut."""
    access: Path | None = None
    """The access file of a trunk that is served; None: a trunk of one's own."""
    ends: str = ""
    """Where bottom and top are, if not in `source`."""
    model: str = ""
    """Which of the models that are served; empty: the first."""
    speculate: str = ""
    """Of `simulations.talk.speculate.MODES`; empty: auto where the trunk is another's, else off:
    trips on one machine are cheaper than guesses."""
    draft_tokens: int = 0
    """Guessed at a time; 0: as suits."""

    def __post_init__(self) -> None:
        if self.access is None and (self.ends or self.model):
            name = "--ends" if self.ends else "--model"
            raise ValueError(f"{name} belongs to a trunk that is served: give --access FILE, too")
        if self.access is not None and self.cut is not None:
            raise ValueError(f"{self.access} says where the model is cut: leave out --cut")
        if bool(self.source) == bool(self.ends):
            raise ValueError(
                "give one of RUN_OR_MODEL and --ends DIR: where bottom and top are"
                if self.source
                else "nothing to talk with: give a run, such as last:demo, or a model with --cut"
            )


@contextmanager
def opened(asked: Asked) -> Iterator[Speaker]:
    """Join what the user named with its trunk, ready to talk; raises as `joined` does."""
    with joined(asked) as found:
        yield speaker_of(found, asked)


@contextmanager
def joined(asked: Asked) -> Iterator[Joined]:
    """Join what the user named with its trunk.

    Raises
    ------
    ValueError
        If it cannot be found or loaded, or does not belong to what is served.
    TrunkError
        If the server cannot be reached, or refuses.
    """
    if asked.access is not None:
        with connect(asked.access, asked.ends or asked.source, model=asked.model) as found:
            yield found
        return
    find_served(asked.source, asked.cut)  # what is wrong with it is said before a process starts
    with open_local(asked.source, cut=asked.cut) as found:
        yield found


def speaker_of(joined: Joined, asked: Asked) -> Speaker:
    """Let what is joined answer, with the speculation that was asked for or that suits."""
    mode = asked.speculate or ("off" if asked.access is None else "auto")
    ends = find_served(asked.ends or asked.source, joined.model.graft_ends[0].cut)
    options = speculation(
        joined.model, mode, folders=bridge_folders(ends), tokens=asked.draft_tokens
    )
    return Speaker(joined.model, joined.tokenizer, joined.name, options=options)
