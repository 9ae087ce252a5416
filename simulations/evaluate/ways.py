"""The ways a model is run: unsplit, split in this process, or with its trunk served elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from flower_app.serving.access import read_access
from flower_app.serving.client import connect
from flower_app.serving.source import Served, load_ends, load_trunk, load_whole_model
from models.remote import join_remote
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model's parts are."""

    source: str
    """As the user names it."""
    served: Served
    """What that is."""
    access: Path | None = None
    """Of a trunk that is served; None: one is started for the purpose."""
    dtype: str = "fp32"


@contextmanager
def unsplit(place: Place) -> Iterator[PreTrainedModel]:
    """The whole model, as everybody runs it."""
    yield load_whole_model(place.served, dtype=place.dtype)


@contextmanager
def split(place: Place) -> Iterator[PreTrainedModel]:
    """Bottom and top around a trunk in this process, which is run as a server runs it."""
    bottom, top = load_ends(place.served, dtype=place.dtype)
    trunk = load_trunk(place.served, dtype=place.dtype)
    limits = Limits(total_mb=2.0**20, session_mb=2.0**20, rows=2**16)
    yield join_remote(bottom, top, LocalTrunk(GenerationEngine(trunk, limits)))


@contextmanager
def served(place: Place) -> Iterator[PreTrainedModel]:
    """The ends here, and the trunk wherever it is served."""
    access = place.access
    if access is None:
        raise ValueError("served: give the access file that `graft serve` wrote, --access FILE")
    same = [m for m in read_access(access).models if m.fingerprint == place.served.fingerprint]
    with connect(access, place.source, model=same[0].name if same else "") as joined:
        yield joined.model


WAYS: dict[str, Callable[[Place], AbstractContextManager[PreTrainedModel]]] = {
    "split": split,
    "unsplit": unsplit,
    "served": served,
}
