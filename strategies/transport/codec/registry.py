"""The codecs that `link.codec` may name: all that this folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from conf.registry import kinds
from conf.rules import ConfigError, check_known
from conf.sections.link import CROSSINGS
from strategies.errors import TrunkError
from strategies.optim import derive_seed
from strategies.transport.codec.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Crossings:
    """A session's codecs, one for each way that tensors cross a cut. Both sides have their own."""

    h1: Codec
    h2: Codec
    grad_h2: Codec
    grad_h1: Codec

    def state_dict(self) -> dict[str, Tensor]:
        """What all of them need in another process, by crossing and name."""
        return {
            f"{way}/{name}": tensor
            for way, codec in vars(self).items()
            for name, tensor in codec.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`."""
        for way, codec in vars(self).items():
            own = {
                n.removeprefix(f"{way}/"): t for n, t in state.items() if n.startswith(f"{way}/")
            }
            codec.load_state_dict(own)

    def most_bytes(self, elements: int, width: int) -> int:
        """Most bytes that so many elements, in rows of this width, take on any of the ways."""
        return max(each.most_bytes(elements, width) for each in vars(self).values())


def codecs() -> dict[str, type[Codec]]:
    """Every codec by its name."""
    return kinds(__name__.rpartition(".")[0], Codec)


def find_codec(name: str, key: str = "link.codec") -> type[Codec]:
    """The codec of a name; `ConfigError` with the nearest one if there is none.

    `key` is where the name was set.
    """
    found = codecs()
    check_known(key, name, found)
    return found[name]


def crossings(names: Mapping[str, str], seed: int) -> Crossings:
    """Fresh codecs for a session.

    Parameters
    ----------
    names : mapping
        Of the codec for each crossing: `link.codec`.
    seed : int
        Of the session, the same on both sides.

    Raises
    ------
    ConfigError
        If a crossing has no codec, or there is no codec of a name.
    """
    if set(names) != set(CROSSINGS):
        raise ConfigError(
            f"codecs are named for {', '.join(sorted(names)) or 'nothing'}, not for "
            f"{', '.join(CROSSINGS)}",
            key="link.codec",
        )
    return Crossings(
        **{
            way: find_codec(name, f"link.codec.{way}")(
                derive_seed(seed, way), gradient=way.startswith("grad")
            )
            for way, name in names.items()
        }
    )


def check_codecs(own: Mapping[str, str], others: Mapping[str, str]) -> None:
    """Refuse a trunk whose codecs are not this client's; `TrunkError` names the first of them."""
    for way, name in own.items():
        if (other := others.get(way, "none")) != name:
            raise TrunkError(
                f"{way} travels as {name} here and as {other[:40]} there; start both sides with "
                f"the same link.codec.{way}",
                kind="codec",
            )
