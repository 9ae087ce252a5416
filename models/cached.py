"""What a part keeps of the positions before: its own layers' cache, and how long the others' is.

`transformers` asks a cache how long it is before it makes masks and positions, and may ask any
layer. So layers whose blocks are elsewhere hold a number for each row and position in place of keys
and values: the row's number when they were last written. Whatever is done to a cache (rows chosen
for a beam search, positions cropped) is done to these numbers too, and can be read from them.

Legend: B rows, L positions that are kept, T new ones.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

TRACED = (DynamicLayer, LinearAttentionCacheLayerMixin)
"""Kinds of layers that tell which row is which; others hold nothing."""


class PartCache:
    """The cache of one part.

    Parameters
    ----------
    config : PretrainedConfig
        The model's.
    own : range
        The part's blocks, as in the whole model.

    Attributes
    ----------
    layers : DynamicCache
        As `transformers` has it, of the whole model's layers.
    length : int
        L.
    rows : int
        B; 0 before the first forward.
    attends : bool
        Whether any layer looks back at positions: if not, masks are of the new ones alone.
    """

    def __init__(self, config: PretrainedConfig, own: range) -> None:
        text = config.get_text_config(decoder=True)
        self.layers = new_cache(config)
        self.elsewhere = [i for i in range(text.num_hidden_layers) if i not in own]
        self.attends = any(isinstance(each, CacheLayerMixin) for each in self.layers.layers)
        self.length = self.rows = 0
        # A sliding window forgets only when the next forward comes: until then the last one can be
        # taken back.
        for layer in self.layers.layers:
            if type(layer) is DynamicSlidingWindowLayer:
                layer.activate_past_recording()

    def grow(self, rows: int, new: int) -> None:
        """Note that the part's own layers hold `new` positions more."""
        self.length, self.rows = self.length + new, rows
        stand_in(self.layers, self.elsewhere, rows, self.length)

    def keep(self, rows: Sequence[int], length: int) -> None:
        """Go back to the first `length` positions, and go on with these rows, in this order.

        Parameters
        ----------
        rows : sequence of int
            Empty: all, as they are. A row may go on more than once.
        length : int
            0 to L.

        Raises
        ------
        ValueError
            If a layer has forgotten what it was at that length; the cache is of no more use then.
        """
        if self.length:
            crop(self.layers, self.length - length)
        self.length = length
        if rows and length:
            self.layers.reorder_cache(torch.tensor(rows))
            self.rows = len(rows)

    def copy(self) -> PartCache:
        """A cache of the same content, in memory of its own."""
        return copy.deepcopy(self)

    @property
    def bytes(self) -> int:
        """Memory of the part's own layers."""
        own = (layer for i, layer in enumerate(self.layers.layers) if i not in self.elsewhere)
        return sum(tensor.nbytes for layer in own for tensor in _tensors(layer))


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache as `generate` makes it for a model of this config."""
    return DynamicCache(config=config.get_text_config(decoder=True))


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether a model's forward has an argument of this name."""
    return argument in _parameters(type(model).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def crop(held: Cache, count: int) -> None:
    """Take the last `count` positions back; `ValueError` where a layer cannot."""
    for layer in held.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            if count:
                raise ValueError("a recurrent state cannot be set back")
            continue
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            _check_window(layer, count)
        layer.crop(-count)


def _check_window(layer: DynamicSlidingWindowLayer, count: int) -> None:
    """Refuse to go back to a window of which a part is forgotten."""
    left = layer.get_seq_length() - count
    if min(left, layer.sliding_window - 1) > layer.keys.shape[-2] - count:
        raise ValueError(f"the window of the last {left} positions is forgotten in part")


def stand_in(held: Cache, layers: Iterable[int], rows: int, length: int) -> None:
    """Let layers whose blocks are elsewhere be `length` long, their rows numbered as they are."""
    numbers_B1 = torch.arange(rows, dtype=torch.int32).view(rows, 1)
    for index in layers:
        layer = held.layers[index]
        if isinstance(layer, DynamicLayer):
            _stand_in_attention(layer, numbers_B1, length)
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            _stand_in_recurrent(layer, numbers_B1)


def _stand_in_attention(layer: DynamicLayer, numbers_B1: Tensor, length: int) -> None:
    kept = length
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
        if not layer.record_past:
            kept = min(length, layer.sliding_window - 1)
    layer.device, layer.is_initialized = numbers_B1.device, True
    # An expanded view takes the memory of one number a row.
    layer.keys = layer.values = numbers_B1[:, :, None, None].expand(-1, -1, kept, -1)


def _stand_in_recurrent(layer: LinearAttentionCacheLayerMixin, numbers_B1: Tensor) -> None:
    layer.device = numbers_B1.device
    for i in range(layer.number_of_states):
        layer.has_previous_state[i] = True
        layer.conv_states[i] = layer.recurrent_states[i] = numbers_B1
        layer.is_conv_states_initialized[i] = layer.is_recurrent_states_initialized[i] = True


def rows_of(held: Cache, layer: int) -> Tensor:
    """Return (B,): which row each row of a layer that stands in was, when it was last written."""
    found = held.layers[layer]
    if isinstance(found, DynamicLayer):
        assert found.keys is not None
        return found.keys[:, 0, -1, 0]
    return found.conv_states[0][:, 0]


def _tensors(layer: Any) -> list[Tensor]:
    """The tensors that a layer holds, whatever its kind."""
    held = [each for value in vars(layer).values() for each in _listed(value)]
    return [each for each in held if isinstance(each, Tensor)]


def _listed(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]
