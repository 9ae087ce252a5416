"""A draft model: a client's own ends with a bridge in the trunk's place; it asks nobody.

`transformers`' assisted generation lets it guess, and the model itself check, several tokens at a
time: what is kept is what the model would have said, and each check is one trip to the trunk.

Legend: B rows, T new positions, D hidden size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from models.bridge import Bridge
from models.cached import new_cache
from models.elsewhere import Crossed
from models.parts import Part
from models.remote import join_remote


class BridgeTrunk:
    """A bridge as the trunk of a model; it needs no cache, for it looks at no other position."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge.eval().requires_grad_(False)

    def open(self) -> BridgeTrunk:
        """Itself: there is nothing to keep."""
        return self

    def fork(self) -> BridgeTrunk:
        """Itself."""
        return self

    def close(self) -> None:
        """Nothing is kept."""

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows: Sequence[int] = (),
        length: int = 0,
        keep: bool = True,
    ) -> Crossed:
        """Guess what the trunk would make of these positions."""
        return Crossed(self._bridge(h_BTD), trips=0)


def make_draft(bottom: Part, top: Part, bridge: Bridge, *, tokens: int) -> PreTrainedModel:
    """Make a model for `generate(assistant_model=...)` of a client's ends.

    Parameters
    ----------
    bottom, top : Part
        Of the model that is to check; their parameters are shared.
    bridge : Bridge
    tokens : int
        Drafted at a time, always: a trip costs more than a few steps of the ends. No guess is given
        up for being uncertain.

    Raises
    ------
    ValueError
        If the model cannot be assisted (`refuse_assisting`).
    """
    refuse_assisting(bottom.model)
    draft = join_remote(bottom, top, BridgeTrunk(bridge))
    config = copy.deepcopy(draft.generation_config)
    config.update(
        num_assistant_tokens=tokens,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    draft.generation_config = config
    draft._prepare_attention_mask_for_generation = _all_real
    return draft


def _all_real(inputs_BT: Tensor, generation_config: Any, model_kwargs: Any) -> Tensor:
    """The draft's mask if `generate` drops the model's, which says nothing: there is no padding.

    `transformers` would guess one from the ids, and take a padding token within a text for padding.
    """
    return torch.ones(inputs_BT.shape[:2], dtype=torch.long, device=inputs_BT.device)


def go_on_from_caches(model: PreTrainedModel) -> None:
    """Have assisted generation go on from a cache that it is given, as all other generation does.

    `transformers` 5.24 hands the model the whole text once more there, and the model says something
    else. Prompts must be given whole, what is cached included.
    """
    if "prepare_inputs_for_generation" in vars(model):
        return
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def rest(input_ids: Tensor, next_sequence_length: int | None = None, **how: Any) -> Any:
        cache = how.get("cache")
        if how.get("is_first_iteration") and next_sequence_length is None and cache is not None:
            past = cache.get_seq_length()
            next_sequence_length = input_ids.shape[1] - past if past else None
        return prepare(input_ids, next_sequence_length=next_sequence_length, **how)

    model.prepare_inputs_for_generation = rest


def refuse_assisting(model: PreTrainedModel) -> None:
    """Refuse a model whose state cannot be set back by the tokens that were guessed wrong."""
    layers = new_cache(model.config).layers
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        raise ValueError(
            f"{model.config.model_type} keeps a recurrent state, which cannot be set back by "
            "tokens that were guessed wrong: use it without speculation (--speculate off)"
        )
