"""Floating-point operations, counted as they are dispatched, by torch's own formulas.

`torch.utils.flop_counter.FlopCounterMode` counts the same, but follows modules with hooks that hold
tensors longer than they would live: memory could not be counted in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


class Operations(TorchDispatchMode):
    """Adds up the operations of matrix products, convolutions and attention.

    Attributes
    ----------
    flops : int
        So far; a multiplication and an addition are two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _OWN:
            self.flops += _OWN[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Every row of `a` meets the matrix of one expert; or every column of `a` a row of `b`."""
    return int(2 * a.shape[-2] * a.shape[-1] * b.shape[-1])


_aten = torch.ops.aten
_OWN: Mapping[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._grouped_mm: _grouped,
}
"""What torch has no formula for, as of 2.13."""
