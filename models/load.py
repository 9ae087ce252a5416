"""Load one role's tensors out of a checkpoint, strictly, without ever holding the whole model.

The whole model is built on the meta device, where it costs no memory; the part is cut out of it,
and only the checkpoint tensors that end up in the part are read. Renaming and conversion of
checkpoint keys are transformers' own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

from models.anatomy import examine
from models.buffers import make_buffers, without_masks
from models.checked import split
from models.cut import ROLES, Cut
from models.families import require_tested
from models.parts import Part
from models.shards import Shards
from models.verify import check_twin
from models.whole import (
    build_hollow,
    load_whole,
    no_progress_bar,
    parse_attention,
    parse_dtype,
    read_config,
)


class Loading(TypedDict, total=False):
    """How a part is held in memory."""

    dtype: str
    """Type of the weights: float32, float16 or bfloat16 (fp32, fp16, bf16)."""
    attention: str
    """sdpa or eager."""
    allow_untested: bool
    """Split a family outside the tested table, if a tiny model of its config splits exactly."""
    device: str


def load_part(role: str, path_or_id: str, cut: Cut, **how: Unpack[Loading]) -> Part:
    """Load the bottom, trunk or top of a checkpoint; only its own tensors are read.

    Parameters
    ----------
    role : str
        ``bottom``, ``trunk`` or ``top``.
    path_or_id : str
        Folder or hub id with safetensors, sharded or not. A ``.gguf`` file works too, but cannot
        be read in part: the whole model is in memory for a moment.
    cut : Cut
    **how : Loading
        By default float32, sdpa, tested families, on the CPU.

    Returns
    -------
    Part
        In evaluation mode.

    Raises
    ------
    ValueError
        If a tensor of the role is missing, of another shape, or the checkpoint has one that the
        model does not know and transformers does not ignore; if the cut or the family is refused.
    """
    return _load((role,), path_or_id, cut, **how)[0]


def load_client(path_or_id: str, cut: Cut, **how: Unpack[Loading]) -> tuple[Part, Part]:
    """Load the bottom and the top of a checkpoint; tied embeddings are one Parameter.

    Parameters and errors are those of `load_part`; a checkpoint whose config ties head and
    embedding, but which holds different values for them, is refused.
    """
    bottom, top = _load(("bottom", "top"), path_or_id, cut, **how)
    return bottom, top


def _load(
    roles: tuple[str, ...],
    path_or_id: str,
    cut: Cut,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    allow_untested: bool = False,
    device: str = "cpu",
) -> list[Part]:
    if unknown := set(roles) - set(ROLES):
        raise ValueError(f"unknown role {unknown.pop()!r}; must be one of {', '.join(ROLES)}")
    if path_or_id.endswith(".gguf"):
        whole = load_whole(path_or_id, dtype=dtype, attention=attention)
        parts = split(whole, cut, allow_untested=allow_untested)
        return [getattr(parts, role).to(device).eval() for role in roles]
    hollow, checkpoint = _outline(path_or_id, cut, dtype, attention, allow_untested)
    anatomy, target_of = examine(hollow), _targets(hollow, checkpoint)
    loaded: dict[int, nn.Parameter] = {}
    found = []
    for role in roles:
        part = Part(hollow, role, cut, anatomy)
        _fill(part, hollow, checkpoint, target_of, loaded)
        found.append(part.to(device).eval())
    return found


def _outline(
    path_or_id: str, cut: Cut, dtype: str, attention: str, allow_untested: bool
) -> tuple[PreTrainedModel, Shards]:
    """Return the whole model on the meta device, and the checkpoint it would be read from."""
    kind = parse_dtype(dtype)
    config = read_config(path_or_id)
    how = parse_attention(attention, config)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path_or_id} is quantized; split an unquantized checkpoint")
    if not require_tested(config, allow_untested):
        check_twin(config, cut)
    checkpoint = Shards.find(path_or_id)
    return build_hollow(config, dtype=kind, attn_implementation=how), checkpoint


def _targets(hollow: PreTrainedModel, checkpoint: Shards) -> dict[str, str]:
    """Return for each key of the checkpoint the model's name of it, as transformers reads it.

    What transformers drops without a word (old rotary buffers, masked biases) is left out; other
    keys that the model does not have are refused.
    """
    mapping = get_model_conversion_mapping(hollow)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names, prefix = hollow.state_dict(), hollow.base_model_prefix
    target_of = {}
    for key in checkpoint.shard_of:
        name, _ = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, _ = rename_source_key(key, [], [], prefix, names)
        target_of[key] = name
    strangers = _not_ignored(hollow, unexpected=set(target_of.values()) - names.keys()).unexpected
    if strangers:
        keys = sorted(key for key, name in target_of.items() if name in strangers)
        raise ValueError(
            f"{checkpoint.source} has unexpected tensors: {', '.join(keys[:8])}"
            f"{_saved_as_another(hollow)}"
        )
    return {key: name for key, name in target_of.items() if name in names}


class _Keys(NamedTuple):
    missing: set[str]
    unexpected: set[str]


def _not_ignored(
    model: PreTrainedModel, missing: Iterable[str] = (), unexpected: Iterable[str] = ()
) -> _Keys:
    """What transformers would complain about; it knows some keys that do not matter."""
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return _Keys(info.missing_keys, without_masks(info.unexpected_keys))


def _saved_as_another(hollow: PreTrainedModel) -> str:
    own, saved = type(hollow).__name__, getattr(hollow.config, "architectures", None) or []
    return "" if not saved or own in saved else f"; it was saved as {saved[0]} and is read as {own}"


def _fill(
    part: Part,
    hollow: PreTrainedModel,
    checkpoint: Shards,
    target_of: dict[str, str],
    loaded: dict[int, nn.Parameter],
) -> None:
    """Read the part's tensors; `loaded` maps meta parameters to ones that are read already."""
    model = part.model
    make_buffers(model)
    origin = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    own = model.state_dict().keys()
    wanted = {key: key for key, name in target_of.items() if name in own}
    _borrow_tied(wanted, origin, hollow, target_of)
    dtype = next(model.parameters()).dtype
    plan = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=hollow._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(hollow),
    )
    with ExitStack() as stack, no_progress_bar(), torch.random.fork_rng(devices=[]):
        slices = checkpoint.slices(set(wanted.values()), stack)
        state = {key: slices[source] for key, source in wanted.items()}
        info, _ = convert_and_load_state_dict_in_model(model, state, plan)
    _report(part, hollow, info, checkpoint.source)
    _tie(part, origin, loaded)
    stale = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if stale:
        raise ValueError(f"{checkpoint.source}: nothing was read for {', '.join(stale[:8])}")


def _borrow_tied(
    wanted: dict[str, str],
    origin: dict[str, int],
    hollow: PreTrainedModel,
    target_of: dict[str, str],
) -> None:
    """Let a tied tensor that the checkpoint stores under its other name be read from there."""
    twins: dict[int, list[str]] = {}
    for name, parameter in hollow.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    key_of = {name: key for key, name in target_of.items()}
    for name, number in origin.items():
        if name in key_of:
            continue
        for other in twins.get(number, []):
            if other in key_of:
                wanted.setdefault(name, key_of[other])


def _report(part: Part, hollow: PreTrainedModel, info: LoadStateDictInfo, source: str) -> None:
    problems = []
    keys = _not_ignored(hollow, info.missing_keys, info.unexpected_keys)
    if keys.missing:
        problems.append(f"missing {', '.join(sorted(keys.missing)[:8])}")
    if keys.unexpected:
        problems.append(f"unexpected {', '.join(sorted(keys.unexpected)[:8])}")
    for name, got, want in sorted(info.mismatched_keys, key=str):
        problems.append(f"{name} has shape {tuple(got)}, must be {tuple(want)}")
    problems += [f"{name}: {why}" for name, why in info.conversion_errors.items()]
    if problems:
        raise ValueError(
            f"{source} does not fit the {part.role}: {'; '.join(problems)}"
            f"{_saved_as_another(hollow)}"
        )


def _tie(part: Part, origin: dict[str, int], loaded: dict[int, nn.Parameter]) -> None:
    """Make one Parameter again of what was one before loading, here and in the other part."""
    for name, number in origin.items():
        parent, _, leaf = name.rpartition(".")
        module = part.model.get_submodule(parent)
        parameter = module._parameters[leaf]
        assert parameter is not None
        first = loaded.setdefault(number, parameter)
        if first is parameter:
            continue
        if not torch.equal(first.detach().cpu(), parameter.detach()):
            raise ValueError(
                f"the config ties {name} to the embedding, but the checkpoint holds different "
                "values for them; set tie_word_embeddings to false in config.json"
            )
        module._parameters[leaf] = first
