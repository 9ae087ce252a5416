"""Where a model is split: pure arithmetic on block counts, apart from any surgery on modules."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("bottom", "trunk", "top")


@dataclass(frozen=True)
class Cut:
    """How many blocks the client keeps below and above the trunk."""

    bottom: int = 2
    """Blocks below the trunk; 0 leaves the client its embeddings only."""
    top: int = 1
    """Blocks above the trunk; 0 leaves the client its final norm and head only."""

    def __post_init__(self) -> None:
        for name, value in (("bottom", self.bottom), ("top", self.top)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"cut.{name} must be a whole number of blocks, not {value!r}")
            if value < 0:
                raise ValueError(f"cut.{name} must be 0 or more blocks, not {value}")

    def ranges(self, num_blocks: int) -> dict[str, range]:
        """Return which blocks each role owns.

        Parameters
        ----------
        num_blocks : int
            Blocks of the whole model.

        Returns
        -------
        dict[str, range]
            Keys ``bottom``, ``trunk`` and ``top``; together they cover ``range(num_blocks)``.

        Raises
        ------
        ValueError
            If no block is left for the trunk.
        """
        if self.bottom + self.top >= num_blocks:
            raise ValueError(
                f"split leaves no trunk: the model has {num_blocks} blocks, "
                f"bottom={self.bottom} + top={self.top}; lower one of them"
            )
        below, above = self.bottom, num_blocks - self.top
        return {
            "bottom": range(below),
            "trunk": range(below, above),
            "top": range(above, num_blocks),
        }

    def __str__(self) -> str:
        return f"{self.bottom},{self.top}"


def in_ends(name: str, *, block_list: str, num_blocks: int, cut: Cut) -> bool:
    """Say whether a tensor belongs to the ends of a client with this cut, or to the trunk.

    Parameters
    ----------
    name : str
        In the whole model: of a weight, an adapter, a residual.
    block_list : str
        Name of the block list, ``model.layers`` say (`Part.block_list`).
    num_blocks : int
        Blocks of the whole model (`Part.num_blocks_total`).
    cut : Cut

    Returns
    -------
    bool
        True for every tensor outside the blocks: embeddings, final norm, head.

    Raises
    ------
    ValueError
        If the name is of a block that the model does not have.
    """
    number, inside, _ = name.removeprefix(block_list + ".").partition(".")
    if not name.startswith(block_list + ".") or not inside or not number.isdecimal():
        return True
    if int(number) >= num_blocks:
        raise ValueError(f"{name} is of block {number}; the model has {num_blocks} blocks")
    return int(number) not in cut.ranges(num_blocks)["trunk"]
