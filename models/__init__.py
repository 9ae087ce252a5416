"""Splitting, loading, adapting and saving transformer models. Knows nothing of Flower."""

from models.cut import Cut
from models.parts import Part, Parts, split

__all__ = ["Cut", "Part", "Parts", "split"]
