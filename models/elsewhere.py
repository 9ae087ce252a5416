"""What a trunk that is elsewhere does: sessions with a cache each, and what their forwards took.

Legend: B rows, L positions that are cached, T new ones, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

from torch import Tensor


class Crossed(NamedTuple):
    """What came back from the trunk, and what it took."""

    h_BTD: Tensor
    seconds: float = 0.0
    """In the trunk."""
    bytes_up: int = 0
    bytes_down: int = 0
    trips: int = 1


class RemoteSession(Protocol):
    """One cache on the trunk, and the forwards that go on from it."""

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows: Sequence[int] = (),
        length: int = 0,
        keep: bool = True,
    ) -> Crossed:
        """Run the trunk on new positions.

        Parameters
        ----------
        h_BTD : Tensor
            The bottom's output for the T new positions.
        mask_BT : Tensor, optional
            Bool; false where a new position is padding. None: nowhere.
        positions_BT : Tensor, optional
            Int64, where the new positions stand in their texts. None: after what is cached.
        rows : sequence of int
            Which rows of what is cached go on, in this order; empty: all.
        length : int
            How many of the cached positions go on: L.
        keep : bool
            Whether the new positions are cached.
        """
        ...

    def fork(self) -> RemoteSession:
        """A session that begins with what this one has cached now."""
        ...

    def close(self) -> None:
        """Let the trunk forget it."""
        ...


class RemoteTrunk(Protocol):
    """A trunk somewhere else."""

    def open(self) -> RemoteSession:
        """A session with nothing cached."""
        ...


@dataclass
class Tally:
    """What forwards came to, added up; the difference of two is what lies between them."""

    forwards: int = 0
    positions: int = 0
    """New ones, of all rows."""
    trips: int = 0
    seconds_bottom: float = 0.0
    seconds_network: float = 0.0
    seconds_trunk: float = 0.0
    seconds_top: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def copy(self) -> Tally:
        """The sums as they are now."""
        return Tally(**vars(self))

    def __sub__(self, other: Tally) -> Tally:
        names = (field.name for field in fields(self))
        return Tally(**{name: getattr(self, name) - getattr(other, name) for name in names})
