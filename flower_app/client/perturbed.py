"""A frozen perturbation of the embedding and the head, which only sites with the key can foretell.

Shapes: V vocabulary, D hidden size, B sequences, T tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from flower_app.client.defences._normal import normal
from flower_app.client.site_key import SiteKey
from models import Part

EMBEDDING, HEAD = "embedding", "head"
_HELD = "graft_perturbed"


def perturb(bottom: Part, top: Part, key: SiteKey, strength: float) -> None:
    """Let a client's ends add each token's own vectors to its embedding and to its row of the head.

    The vectors are the same at all sites with the key and in all rounds, and are not trained. What
    perturbed these parts before does so no more.

    Parameters
    ----------
    bottom, top : Part
        The client's.
    key : SiteKey
        Of the sites.
    strength : float
        Standard deviation of each element, in multiples of the model's `initializer_range`; 0:
        nothing is added.

    Raises
    ------
    ValueError
        If the model cannot have it.
    """
    for part in (bottom, top):
        if (handle := getattr(part, _HELD, None)) is not None:
            handle.remove()
            object.__delattr__(part, _HELD)
    if not strength:
        return
    embedding, head = _module(bottom.model, EMBEDDING), _module(top.model, HEAD)
    # Once where the weights are: not in each step.
    embedding_VD = perturbation(bottom.model, key, strength, EMBEDDING).to(embedding.weight)
    head_VD = perturbation(top.model, key, strength, HEAD).to(head.weight)

    def embedded(module: nn.Module, args: Any, out_BTD: Tensor) -> Tensor:
        return out_BTD + embedding_VD[args[0]].to(out_BTD)

    def told(module: nn.Module, args: Any, out_BTV: Tensor) -> Tensor:
        return out_BTV + args[0] @ head_VD.to(args[0]).T

    _hold(bottom, embedding.register_forward_hook(embedded))
    _hold(top, head.register_forward_hook(told))


def perturbation(model: PreTrainedModel, key: SiteKey, strength: float, where: str) -> Tensor:
    """The vector (V, D) of each token in the `EMBEDDING` or the `HEAD`, fp32.

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
    shape = _module(model, where).weight.shape
    return strength * float(unit) * _table(key.of_perturbation(where), shape)


def fold(whole: PreTrainedModel, key: SiteKey, strength: float) -> None:
    """Add the perturbation to a whole model's weights; a head that was tied to the embedding is
    tied no more."""
    for where in (EMBEDDING, HEAD):
        module = _module(whole, where)
        weight_VD = module.weight.detach()
        table_VD = perturbation(whole, key, strength, where).to(weight_VD)
        module.weight = nn.Parameter(weight_VD + table_VD)
    for config in (whole.config, whole.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False


def _module(model: PreTrainedModel, where: str) -> nn.Module:
    """The embedding or the head, if its weight is all there is to it."""
    module = model.get_input_embeddings() if where == EMBEDDING else model.get_output_embeddings()
    if where == HEAD and isinstance(module, nn.Linear):
        return module
    if where == EMBEDDING and _only_looks_up(module):
        return module
    raise ValueError(
        f"privacy.perturb adds to a row of each token, and the {where} of {type(model).__name__} "
        f"({type(module).__name__}) is more than that, or none: set privacy.perturb=0"
    )


def _only_looks_up(embedding: nn.Module) -> bool:
    ids_2 = torch.arange(2, device=embedding.weight.device)
    return torch.equal(embedding.forward(ids_2), embedding.weight[ids_2])


def _hold(part: Part, handle: RemovableHandle) -> None:
    object.__setattr__(part, _HELD, handle)


@lru_cache(maxsize=2)
def _table(key: bytes, shape: torch.Size) -> Tensor:
    return normal(key, shape)
