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
