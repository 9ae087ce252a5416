"""Nested state as named tensors and JSON, and back again exactly: no pickle.

What a file can hold apart: tensors in one file, everything else as text that can be read and
checked before anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flatten(value: Any, place: str = "") -> tuple[dict[str, Tensor], Any]:
    """Divide nested state, such as an optimizer's `state_dict()`, into tensors and a plan of it.

    Parameters
    ----------
    value : Any
        Tensors, dicts with keys of text or whole numbers, lists, tuples, numbers, text, bools and
        None, nested.
    place : str
        Where it is, which begins the names of its tensors.

    Returns
    -------
    tensors : dict[str, Tensor]
        Named by where they are; they share memory with `value`.
    plan : Any
        JSON: a list that begins with the kind, or a bool, a whole number, text or None.

    Raises
    ------
    TypeError
        If something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _plan(value, place, tensors)


def unflatten(tensors: Mapping[str, Tensor], plan: Any) -> Any:
    """Put together what `flatten` divided; `ValueError` if tensor and plan do not fit together."""
    try:
        return _built(tensors, plan)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the tensors do not fit their plan: {error!r}") from error


def _plan(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if place in tensors:
            raise TypeError(f"two tensors would be called '{place}'")
        tensors[place] = value.detach()
        return ["tensor", place]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # repr gives every finite float back; JSON knows no others.
        return ["float", value if math.isfinite(value) else repr(value)]
    if isinstance(value, (list, tuple)):
        inside = [_plan(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return ["tuple" if isinstance(value, tuple) else "list", inside]
    if isinstance(value, Mapping):
        if odd := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{place or 'the state'} has a key {odd[0]!r}: text or int is kept")
        # Pairs, not an object: JSON would turn 0 into "0".
        return ["dict", [[k, _plan(v, f"{place}/{k}", tensors)] for k, v in value.items()]]
    raise TypeError(f"{place or 'the state'} holds a {type(value).__name__}, which is not kept")


def _built(tensors: Mapping[str, Tensor], plan: Any) -> Any:
    if plan is None or isinstance(plan, (bool, int, str)):
        return plan
    kind, inside = plan
    if kind == "tensor":
        return tensors[inside]
    if kind == "float":
        return float(inside)
    if kind == "dict":
        return {key: _built(tensors, item) for key, item in inside}
    items = [_built(tensors, item) for item in inside]
    return tuple(items) if kind == "tuple" else items
