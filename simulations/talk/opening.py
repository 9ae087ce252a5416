"""What is to talk, found and loaded by what the user named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flower_app.serving.source import find_served, load_tokenizer, load_whole_model
from models import Cut
from simulations.talk.speaker import Speaker


@contextmanager
def opened(source: str, *, cut: Cut | None = None) -> Iterator[Speaker]:
    """Load what `source` names, ready to talk.

    Parameters
    ----------
    source : str
        A run, a model, an adapter or a folder of parts (`find_served`).
    cut : Cut, optional
        Of a model that does not say where it is cut.
    """
    served = find_served(source, cut)
    yield Speaker(load_whole_model(served), load_tokenizer(served), served.name)
