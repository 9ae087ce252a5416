"""A LoRA adapter as the point where training starts: gone on with, or merged into its base."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from models.adapters import Lora, merge
from models.anatomy import find_blocks
from models.export import PREFIX, peft_places
from models.parts import Part
from models.source import ADAPTER_WEIGHTS
from models.weights import ADAPTER


def take_over(
    folder: Path, model: PreTrainedModel, trained: Mapping[str, Tensor], lora: Lora
) -> dict[str, Tensor] | None:
    """Read an adapter as the first values of a run that trains the same one.

    Parameters
    ----------
    folder : Path
        Of the adapter.
    model : PreTrainedModel
        Its base without weights (`outline`).
    trained : mapping
        All that the run trains, by global name; only shapes count.
    lora : Lora
        The run's settings.

    Returns
    -------
    dict[str, Tensor] or None
        A value for each name of `trained`; None if the adapter is not of these weights, this rank
        and this alpha, or is more than two factors for each.
    """
    settings, tensors = _read(folder)
    same = settings.lora_alpha == lora.alpha and settings.bias == "none"
    more = (
        "use_rslora use_dora rank_pattern alpha_pattern modules_to_save lora_bias "
        "trainable_token_indices layer_replication"
    )
    names = {name.rpartition(".lora_")[0] for name in trained}
    if not same or any(getattr(settings, key, None) for key in more.split()) or "" in names:
        return None
    places, found = peft_places(model, names), {}
    for name, like in trained.items():
        adapted, _, kind = name.rpartition(".lora_")
        value = tensors.pop(f"{PREFIX}{places[adapted]}.lora_{kind[0]}.weight", None)
        if value is None or (value := _as_trained(value, kind[0], like)) is None:
            return None
        found[name] = value
    return None if tensors else found


def _as_trained(value: Tensor, kind: str, like: Tensor) -> Tensor | None:
    """Undo what `save_adapter` does to the factors of experts; None if the sizes differ."""
    if like.dim() == 3:
        experts = like.shape[1] if kind == "A" else like.shape[2]
        if value.dim() != 2 or value.numel() != like.numel():
            return None
        value = (
            value.reshape(experts, -1, value.shape[1]).transpose(0, 1)
            if kind == "A"
            else value.reshape(len(value), -1, experts)
        )
    return value.float().contiguous() if value.shape == like.shape else None


def merge_adapter(part: Part, folder: Path) -> None:
    """Add what an adapter holds for a part's own weights to them, in place.

    Raises
    ------
    ValueError
        If its tensors are not those that PEFT needs for this part.
    """
    if add_adapter(part, folder):
        merge(part)
        del part.model.peft_config


def add_adapter(part: Part, folder: Path) -> bool:
    """Put an adapter beside a part's own weights, which stay as they are, in place.

    Returns
    -------
    bool
        Whether it holds anything for this part.

    Raises
    ------
    ValueError
        If its tensors are not those that PEFT needs for this part.
    """
    settings, tensors = _read(folder)
    own = {name: tensor for name, tensor in tensors.items() if _is_of(part, name)}
    if not own:
        return False
    fresh = copy.deepcopy(settings)
    fresh.inference_mode, fresh.lora_dropout = False, 0.0
    inject_adapter_in_model(fresh, part.model, adapter_name=ADAPTER)
    result = set_peft_model_state_dict(part.model, own, adapter_name=ADAPTER)
    unread = set(result.unexpected_keys)
    absent = {name for name in result.missing_keys if ".lora_" in name}
    if unread or absent:
        odd = sorted(unread | absent)
        raise ValueError(f"the adapter {folder} does not fit the {part.role}: {', '.join(odd[:4])}")
    return True


def check_adapted(folder: Path, model: PreTrainedModel) -> None:
    """Refuse an adapter of anything but weights in its base's blocks.

    Parameters
    ----------
    folder : Path
        Of the adapter.
    model : PreTrainedModel
        Its base without weights.
    """
    blocks = find_blocks(model) + "."
    known = {name for name, _ in model.named_modules()}
    for name in _read(folder)[1]:
        module = _module_of(name)
        if ".lora_" not in name or (module in known and not module.startswith(blocks)):
            raise ValueError(
                f"the adapter {folder} changes {module}, and Graft starts from factors for weights "
                "of the blocks alone: merge it once with PEFT (merge_and_unload, save_pretrained), "
                "and set model.path to the result"
            )
        if module not in known:
            raise ValueError(
                f"the adapter {folder} adapts {module}, which its base ({type(model).__name__}) "
                "does not have; set model.base to the model that it was trained on"
            )


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    try:
        return LoraConfig.from_pretrained(str(folder)), load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter {folder} cannot be read: {error}") from error


def _module_of(key: str) -> str:
    """The whole model's module that a tensor of an adapter belongs to."""
    return key.removeprefix(PREFIX).partition(".lora_")[0].replace(".base_layer", "")


def _is_of(part: Part, key: str) -> bool:
    """Whether a part owns the block of a tensor; nothing outside the blocks has an adapter."""
    number = _module_of(key).removeprefix(part.block_list + ".").partition(".")[0]
    return number.isdecimal() and int(number) in part.blocks
