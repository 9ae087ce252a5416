"""What a client has sent of one text, so that another session on the trunk can begin with it.

Legend: B rows, L positions that are held, T new ones, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """New positions for the trunk; see `models.elsewhere.RemoteSession.forward`."""

    h_BTD: Tensor
    mask_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    rows: tuple[int, ...] = ()
    length: int = 0
    keep: bool = True

    @property
    def width(self) -> int:
        """T."""
        return self.h_BTD.shape[1]

    def split(self, chunk: int) -> Iterator[Call]:
        """The same in calls of at most `chunk` positions; each needs what came before."""
        for start in range(0, self.width, chunk):
            here = slice(start, start + chunk)
            yield replace(
                self._of(lambda each, here=here: each[:, here]),  # type: ignore[misc]
                rows=self.rows if start == 0 else (),
                length=self.length + start,
                keep=self.keep or self.width > chunk,
            )

    def of_rows(self, rows: Sequence[int]) -> Call:
        """The same of these rows."""
        return self._of(lambda each: each[list(rows)])

    def first(self, count: int) -> Call:
        """The first positions alone."""
        return self._of(lambda each: each[:, :count])

    def _of(self, pick: object) -> Call:
        def picked(each: Tensor | None) -> Tensor | None:
            return None if each is None else pick(each)  # type: ignore[operator, no-any-return]

        h_BTD = picked(self.h_BTD)
        assert h_BTD is not None
        return replace(
            self,
            h_BTD=h_BTD,
            mask_BT=picked(self.mask_BT),
            positions_BT=picked(self.positions_BT),
        )

    @property
    def _plain(self) -> tuple[bool, bool]:
        return self.mask_BT is None, self.positions_BT is None


class History:
    """The positions that a session holds on the trunk, as they were sent.

    Immutable: `after` makes another one, which shares memory with it.
    """

    def __init__(self, pieces: Sequence[Call] = ()) -> None:
        self._pieces = tuple(pieces)
        self.length = sum(piece.width for piece in self._pieces)

    def after(self, call: Call) -> History:
        """What is held after a call."""
        before = self.chosen(call.rows, call.length)
        if not call.keep:
            return before
        return History([*before._pieces, replace(call, rows=(), length=before.length)])

    def chosen(self, rows: Sequence[int], length: int) -> History:
        """The first positions, of these rows; no rows: all."""
        kept, left = [], length
        for piece in self._pieces:
            if left <= 0:
                break
            kept.append(piece if piece.width <= left else piece.first(left))
            left -= piece.width
        return History([piece.of_rows(rows) for piece in kept] if rows else kept)

    def calls(self) -> Iterator[Call]:
        """Calls that bring an empty session to this point; pieces that are alike go together."""
        length = 0
        for (no_mask, no_positions), group in groupby(self._pieces, lambda each: each._plain):
            pieces = list(group)
            call = Call(
                h_BTD=torch.cat([each.h_BTD for each in pieces], 1),
                mask_BT=None if no_mask else torch.cat(_known([e.mask_BT for e in pieces]), 1),
                positions_BT=(
                    None
                    if no_positions
                    else torch.cat(_known([each.positions_BT for each in pieces]), 1)
                ),
                length=length,
            )
            length += call.width
            yield call


def _known(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [each for each in tensors if each is not None]
