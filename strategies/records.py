"""The records of a Flower message: how they are called, and how tensors are packed into them."""

from __future__ import annotations

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

ARRAYS, CONFIG, TICKET = "arrays", "config", "ticket"
METRICS, OUTCOME, PROFILE, FRAMES = "metrics", "outcome", "profile", "frames"
"""Names of the records in a message and its reply."""

KEY_LOST = "this node has lost the key that its ticket was made for"
"""Begins the error of a node whose state is gone; it is asked anew who it is."""


def to_arrays(state: dict[str, Tensor]) -> ArrayRecord:
    """Pack named tensors for a Flower message; bf16, which NumPy lacks, travels as fp32."""
    return ArrayRecord(
        {
            name: Array(
                (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
            )
            for name, tensor in state.items()
        }
    )


def from_arrays(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Unpack `to_arrays`; NumPy's errors, if they are not what it packs."""
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}
