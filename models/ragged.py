"""Single tokens of several texts in one forward: each attends to the cache of its own text.

What a transformer does to a token alone (projections, experts, norms) is done to all of them as one
batch, so that weights are read once; attention goes text by text, over caches that stay where they
are, of whatever length, without padding or copying (the idea of continuous batching: Orca, OSDI
2022). It is the model's own attention function that is called.

Legend: S texts, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.anatomy import share_copy
from models.cached import PartCache
from models.parts import Part

NAME = "graft_ragged"
TOLERANCE = 1e-5
"""How far, relative to the largest, a token may be from itself alone."""


class Unbatchable(ValueError):
    """A family whose single tokens must go one by one, and why."""


class Ragged:
    """A part that takes single tokens of several texts at once.

    Parameters
    ----------
    part : Part
        Its parameters are shared.

    Raises
    ------
    Unbatchable
        If its attention cannot be called text by text, or gives other results then.
    """

    def __init__(self, part: Part) -> None:
        self._part = share_copy(part)
        inner = part.config.get_text_config(decoder=True)._attn_implementation
        for module in self._part.model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PretrainedConfig):
                config._attn_implementation = NAME
                config.graft_inner = inner
        _check(part, self)

    def forward(self, h_S1D: Tensor, caches: Sequence[PartCache]) -> Tensor:
        """Run the part on the next token of each text.

        Parameters
        ----------
        h_S1D : Tensor
            Activations (S, 1, D).
        caches : sequence of PartCache
            One for each text, of one row without padding; each grows by one position.

        Returns
        -------
        Tensor
            (S, 1, D).
        """
        positions = torch.tensor([[cache.length] for cache in caches], device=h_S1D.device)
        return self._part(h_S1D, positions=positions, cache=_Together(caches))


class _Rows(list[Tensor]):
    """Keys or values of each text."""


class _Layers(DynamicCache):
    """Caches of several texts as one: what is written goes to each its row."""

    def __init__(self, caches: Sequence[PartCache]) -> None:
        super().__init__()
        self._each = [cache.layers for cache in caches]
        self.layers = self._each[0].layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        found = [
            layers.update(key_states[i : i + 1], value_states[i : i + 1], layer_idx)
            for i, layers in enumerate(self._each)
        ]
        return _Rows(key for key, _ in found), _Rows(value for _, value in found)


class _Together(PartCache):
    """The part's view of several caches."""

    def __init__(self, caches: Sequence[PartCache]) -> None:
        self._caches = caches
        self.layers = _Layers(caches)
        self.attends = True
        self.length = 0

    def grow(self, rows: int, new: int) -> None:
        for cache in self._caches:
            cache.grow(1, new)


def _attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The model's own attention function, for each text by itself."""
    if not isinstance(key, _Rows):
        raise Unbatchable("its keys do not come from the cache")
    inner = _own(module)
    outputs = [
        inner(module, query[i : i + 1], key[i], value[i], None, **kwargs)[0]
        for i in range(len(query))
    ]
    return torch.cat(outputs), None


def _own(module: Any) -> Callable[..., Any]:
    """The attention function that a module would have called."""
    name = module.config.graft_inner
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return own


AttentionInterface.register(NAME, _attention)


def _check(part: Part, ragged: Ragged) -> None:
    """Compare tokens of texts of different lengths with themselves alone."""
    layers = PartCache(part.config, part.blocks).layers.layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise Unbatchable("it keeps a recurrent state")
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            _compare(part, ragged, generator)
    except (AttributeError, TypeError, RuntimeError, IndexError, KeyError) as error:
        raise Unbatchable(
            f"its attention is not called by way of transformers ({error})"
        ) from error


def _compare(part: Part, ragged: Ragged, generator: torch.Generator) -> None:
    device = next(part.parameters()).device

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, part.dtype)

    pasts = [noise(1, length, part.hidden_size) for length in (3, 7)]
    new_S1D = noise(2, 1, part.hidden_size)
    alone, caches = [], []
    for i, past_1TD in enumerate(pasts):
        cache = PartCache(part.config, part.blocks)
        part(past_1TD, cache=cache)
        caches.append(cache.copy())
        alone.append(part(new_S1D[i : i + 1], cache=cache))
    want, got = torch.cat(alone).float(), ragged.forward(new_S1D, caches).float()
    far = float((want - got).abs().max() / want.abs().max())
    most = TOLERANCE if part.dtype == torch.float32 else 2e-2
    if not far <= most:
        raise Unbatchable(f"tokens together differ from tokens alone by {far:.2g}")
