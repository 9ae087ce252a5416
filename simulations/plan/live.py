"""How many bytes torch holds while something runs: on real tensors, and on hollow ones alike."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that an operation reads or makes, until it is freed.

    Storages count once, however many tensors look at them, and for the side that saw them first.
    What a kernel takes for itself while it runs, and what is no tensor (frames), is not seen.

    Attributes
    ----------
    side : str
        For whom storages that are seen now count.
    now, peak : Counter
        Bytes by side: at this moment, and the most since `forget_peak`.
    """

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[Any]] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that are there already: weights, say."""
        for tensor in tensors:
            self._see(tensor)

    def forget_peak(self) -> None:
        """Let the peak begin again."""
        self.peak = Counter(self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        side, size = self.side, storage.nbytes()

        def gone(_: Any) -> None:
            self.now[side] -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now[side] += size
        self.peak[side] = max(self.peak[side], self.now[side])


class Answers(TorchDispatchMode):
    """Answers for hollow tensors what takes real numbers: a scalar is 1, a test holds."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The shape of a grouped product; torch's own outline of it knows bf16 alone."""
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    if a.dim() == 2:
        return a.new_empty(a.shape[0], b.shape[-1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])
