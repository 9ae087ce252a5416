"""The codecs that `link.dtype` may name: all that this folder holds."""

from __future__ import annotations

from dataclasses import dataclass

from conf.registry import kinds
from conf.rules import check_known
from strategies.optim import derive_seed
from strategies.transport.codec.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """A session's codecs, one for each way that tensors cross a cut. Both sides have their own."""

    h1: Codec
    h2: Codec
    grad_h2: Codec
    grad_h1: Codec


def codecs() -> dict[str, type[Codec]]:
    """Every codec by its name."""
    return kinds(__name__.rpartition(".")[0], Codec)


def find_codec(name: str) -> type[Codec]:
    """The codec of a name; `ConfigError` with the nearest one if there is none."""
    found = codecs()
    check_known("link.dtype", name, found)
    return found[name]


def crossings(name: str, session: str) -> Crossings:
    """Fresh codecs of one kind for a session, which it seeds by its name on the server."""
    kind = find_codec(name)
    return Crossings(
        h1=kind(derive_seed(session, "h1")),
        h2=kind(derive_seed(session, "h2")),
        grad_h2=kind(derive_seed(session, "grad-h2")),
        grad_h1=kind(derive_seed(session, "grad-h1")),
    )
