"""The records of a Flower message: how they are called, and how tensors are packed into them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

ARRAYS, CONFIG, TICKET = "arrays", "config", "ticket"
METRICS, OUTCOME, PROFILE, FRAMES = "metrics", "outcome", "profile", "frames"
MASK = "mask"
"""Names of the records in a message and its reply."""

KEY_LOST = "this node has lost the key that its ticket was made for"
"""Begins the error of a node whose state is gone; it is asked anew who it is."""

LARGEST = 1e9
"""Largest magnitude of a trained value that is believed: products of two, summed, fit fp32."""

Form = Mapping[str, tuple[int, ...]]
"""Names and shapes of tensors."""

_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9, ]{0,100})\), \} *\n",
    re.DOTALL,
)
"""All that NumPy writes before an array's elements; its own reader parses whatever it is given."""


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
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
    """Unpack what this process or this node packed itself."""
    return {name: torch.from_numpy(array.numpy()) for name, array in arrays.items()}


def read_arrays(
    arrays: ArrayRecord, form: Form | None = None, *, masked: bool = False
) -> dict[str, Tensor]:
    """Unpack what another party sent: nothing is made of it before it is known to fit.

    Parameters
    ----------
    arrays : ArrayRecord
        As received.
    form : mapping, optional
        The names and shapes it must have; None where the receiver checks them itself.
    masked : bool
        They are fixed-point integers under a mask, of which any value can be.

    Returns
    -------
    dict[str, Tensor]
        fp32 and finite; int64, if masked.

    Raises
    ------
    ValueError
        In words, for another name, shape or type, a damaged array, or a value that is not finite.
    """
    if form is not None and (odd := sorted(arrays.keys() ^ form.keys())):
        kind = "lacks" if odd[0] in form else "holds"
        raise ValueError(
            f"it {kind} '{odd[0]:.80}': it must hold {len(form)} tensors by their names in the "
            f"model, {len(odd)} are missing or unknown"
        )
    return {
        name: _read(name[:80], array, None if form is None else form[name], masked)
        for name, array in arrays.items()
    }


def _read(name: str, array: Array, expected: tuple[int, ...] | None, masked: bool) -> Tensor:
    kind, shape, fortran, data = _header(name, array)
    due = "<i8" if masked else "<f4"  # as all that is trained travels; others may overflow
    if kind != due:
        raise ValueError(f"its '{name}' is {_words(kind)}, not {_words(due)}")
    if expected is not None and shape != expected:
        raise ValueError(f"its '{name}' has shape {shape}, {expected} is due")
    if len(data) != np.dtype(due).itemsize * math.prod(shape):
        raise ValueError(f"its '{name}' of shape {shape} has {len(data)} bytes")
    values = np.frombuffer(data, due).reshape(shape, order="F" if fortran else "C")
    tensor = torch.from_numpy(values.copy())
    if not masked:
        check_values(name, tensor)
    return tensor


def check_values(name: str, tensor: Tensor) -> None:
    """Refuse values that would make an average, or a product of factors, overflow."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"its '{name}' holds values that are not finite")
    if tensor.numel() and float(tensor.abs().max()) > LARGEST:
        raise ValueError(
            f"its '{name}' holds {float(tensor.abs().max()):.3g}; up to {LARGEST:g} is believed"
        )


def _header(name: str, array: Array) -> tuple[str, tuple[int, ...], bool, memoryview]:
    """What an array says it is, and its elements."""
    found = _NPY.match(array.data)
    if found is None or found.end() != 10 + int.from_bytes(found[1], "little"):
        raise ValueError(f"its '{name}' is no array as NumPy writes it")
    shape = tuple(int(size) for size in found[4].replace(b",", b" ").split())
    return (
        found[2].decode("ascii", "replace"),
        shape,
        found[3] == b"True",
        memoryview(array.data)[found.end() :],
    )


def _words(kind: str) -> str:
    """NumPy's name of a type; another byte order, or what is no type, stays as it is."""
    try:
        return kind if kind.startswith(">") else np.dtype(kind).name
    except TypeError:
        return repr(kind)
