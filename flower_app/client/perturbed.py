"""A frozen perturbation of the input embedding, which only sites with the key can foretell.

Shapes: V vocabulary, D hidden size, B sequences, T tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flower_app.client.defences._normal import normal
from flower_app.client.site_key import SiteKey
from models import Part

_HELD = "graft_perturbed"


def perturb(bottom: Part, key: SiteKey, strength: float) -> None:
    """Let a client's bottom add each token's own vector to its embedding.

    The vectors are the same at all sites with the key and in all rounds, and are not trained. What
    perturbed the bottom before does so no more.

    Parameters
    ----------
    bottom : Part
        The client's.
    key : SiteKey
        Of the sites.
    strength : float
        Standard deviation of each element, in multiples of the model's `initializer_range`; 0:
        nothing is added.
    """
    if (handle := getattr(bottom, _HELD, None)) is not None:
        handle.remove()
        object.__delattr__(bottom, _HELD)
    if not strength:
        return
    embedding = bottom.model.get_input_embeddings()
    table_VD = perturbation(bottom.model, key, strength)

    def out(module: nn.Module, args: Any, embedded_BTD: Tensor) -> Tensor:
        return embedded_BTD + table_VD[args[0].cpu()].to(embedded_BTD)

    object.__setattr__(bottom, _HELD, embedding.register_forward_hook(out))


def perturbation(model: PreTrainedModel, key: SiteKey, strength: float) -> Tensor:
    """The vector (V, D) of each token, fp32.

    Raises
    ------
    ValueError
        If the model does not say what its embedding began with.
    """
    config = model.config.get_text_config(decoder=True)
    unit = getattr(config, "initializer_range", None)
    if not unit:
        raise ValueError(
            f"privacy.perturb={strength:g} is in multiples of initializer_range, which the "
            f"configuration of {config.model_type} does not have: set privacy.perturb=0"
        )
    shape = model.get_input_embeddings().weight.shape
    return strength * float(unit) * _table(key.of_embedding, torch.Size(shape))


def fold(whole: PreTrainedModel, key: SiteKey, strength: float) -> None:
    """Add the perturbation to a whole model's input embedding; a head that was tied to it stays as
    it was, and is tied no more."""
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    weight_VD = embedding.weight.detach()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(weight_VD.clone())
        whole.config.tie_word_embeddings = False
        whole.config.get_text_config(decoder=True).tie_word_embeddings = False
    table_VD = perturbation(whole, key, strength).to(weight_VD)
    embedding.weight = nn.Parameter(weight_VD + table_VD)


@lru_cache(maxsize=1)
def _table(key: bytes, shape: torch.Size) -> Tensor:
    return normal(key, shape)
