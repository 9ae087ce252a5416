"""Splitting, loading, adapting and saving transformer models. Knows nothing of Flower."""

from models.cut import Cut
from models.parts import Part, Parts, split
from models.state import (
    client_state,
    global_name,
    load_client_state,
    load_trainable_state,
    named_trainable,
    trainable_state,
)

__all__ = [
    "Cut",
    "Part",
    "Parts",
    "client_state",
    "global_name",
    "load_client_state",
    "load_trainable_state",
    "named_trainable",
    "split",
    "trainable_state",
]
