"""Splitting, loading, adapting and saving transformer models. Knows nothing of Flower."""

from models.adapters import adapted_shares, merge, tune, tune_whole
from models.checked import split
from models.cut import Cut, in_ends
from models.export import complete_pairs, save_adapter, save_full
from models.families import tested_families
from models.load import load_client, load_part
from models.parts import Part, Parts, narrow
from models.residuals import fold_residuals
from models.state import (
    client_state,
    global_name,
    load_client_state,
    load_trainable_state,
    named_trainable,
    trainable_state,
)
from models.whole import build_scratch, load_whole, outline

__all__ = [
    "Cut",
    "Part",
    "Parts",
    "adapted_shares",
    "build_scratch",
    "client_state",
    "complete_pairs",
    "fold_residuals",
    "global_name",
    "in_ends",
    "load_client",
    "load_client_state",
    "load_part",
    "load_trainable_state",
    "load_whole",
    "merge",
    "named_trainable",
    "narrow",
    "outline",
    "save_adapter",
    "save_full",
    "split",
    "tested_families",
    "trainable_state",
    "tune",
    "tune_whole",
]
