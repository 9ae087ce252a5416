"""Load one role's tensors out of a checkpoint, strictly, without ever holding the whole model.

The whole model is built on the meta device, where it costs no memory; the part is cut out of it,
and only the checkpoint tensors that end up in the part are read. Renaming and conversion of
checkpoint keys are transformers' own.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from models.anatomy import examine, find_blocks
from models.checked import split
from models.cut import ROLES, Cut
from models.families import require_tested
from models.parts import Part
from models.shards import Checkpoint
from models.verify import check_twin
from models.whole import load_whole, no_progress_bar, parse_attention, parse_dtype, read_config


def load_part(
    role: str,
    path_or_id: str,
    cut: Cut,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    allow_untested: bool = False,
    device: str = "cpu",
) -> Part:
    """Load the bottom, trunk or top of a checkpoint; only its own tensors are read.

    Parameters
    ----------
    role : str
        ``bottom``, ``trunk`` or ``top``.
    path_or_id : str
        Folder or hub id with safetensors, sharded or not. A ``.gguf`` file works too, but cannot
        be read in part: the whole model is in memory for a moment.
    cut : Cut
    dtype : str
        Type of the weights: float32, float16 or bfloat16 (fp32, fp16, bf16).
    attention : str
        sdpa or eager.
    allow_untested : bool
        Split a family outside the tested table, if a tiny model of its config splits exactly.
    device : str

    Returns
    -------
    Part
        In evaluation mode.

    Raises
    ------
    ValueError
        If a tensor of the role is missing, of another shape, or the checkpoint has one that the
        model does not know; if the cut or the family is refused.
    """
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; must be one of {', '.join(ROLES)}")
    if path_or_id.endswith(".gguf"):
        whole = load_whole(path_or_id, dtype=dtype, attention=attention)
        parts = split(whole, cut, allow_untested=allow_untested)
        return getattr(parts, role).to(device).eval()
    hollow, checkpoint = _outline(path_or_id, cut, dtype, attention, allow_untested)
    part = Part(hollow, role, cut, examine(hollow))
    _fill(part, hollow, checkpoint, {})
    return part.to(device).eval()


def load_client(
    path_or_id: str,
    cut: Cut,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    allow_untested: bool = False,
    device: str = "cpu",
) -> tuple[Part, Part]:
    """Load the bottom and the top of a checkpoint; tied embeddings are one Parameter.

    Parameters and errors are those of `load_part`; a checkpoint whose config ties head and
    embedding, but which holds different values for them, is refused.
    """
    if path_or_id.endswith(".gguf"):
        whole = load_whole(path_or_id, dtype=dtype, attention=attention)
        parts = split(whole, cut, allow_untested=allow_untested)
        return parts.bottom.to(device).eval(), parts.top.to(device).eval()
    hollow, checkpoint = _outline(path_or_id, cut, dtype, attention, allow_untested)
    anatomy = examine(hollow)
    bottom, top = Part(hollow, "bottom", cut, anatomy), Part(hollow, "top", cut, anatomy)
    loaded: dict[int, nn.Parameter] = {}
    _fill(bottom, hollow, checkpoint, loaded)
    bottom.to(device)
    _fill(top, hollow, checkpoint, loaded)
    top.to(device)
    return bottom.eval(), top.eval()


def _outline(
    path_or_id: str, cut: Cut, dtype: str, attention: str, allow_untested: bool
) -> tuple[PreTrainedModel, Checkpoint]:
    """Return the whole model on the meta device, and the checkpoint it would be read from."""
    kind = parse_dtype(dtype)
    config = read_config(path_or_id)
    how = parse_attention(attention, config)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path_or_id} is quantized; split an unquantized checkpoint")
    if not require_tested(config, allow_untested):
        check_twin(config, cut)
    checkpoint = Checkpoint.find(path_or_id)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(config, dtype=kind, attn_implementation=how)
    _make_buffers(hollow, outside=find_blocks(hollow))
    return hollow, checkpoint


def _fill(
    part: Part, hollow: PreTrainedModel, checkpoint: Checkpoint, loaded: dict[int, nn.Parameter]
) -> None:
    """Read the part's tensors; `loaded` maps meta parameters to ones that are read already."""
    model = part.model
    _make_buffers(model)
    whole_names = hollow.state_dict()
    origin = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    wanted = _wanted_keys(model, whole_names, checkpoint, hollow)
    _borrow_tied(wanted, origin, hollow, checkpoint)
    mapping = get_model_conversion_mapping(hollow)
    dtype = next(model.parameters()).dtype
    plan = LoadStateDictConfig(
        dtype=dtype, dtype_plan=hollow._get_dtype_plan(dtype), weight_mapping=mapping
    )
    with ExitStack() as stack, no_progress_bar(), torch.random.fork_rng(devices=[]):
        slices = checkpoint.slices(set(wanted.values()), stack)
        state = {key: slices[source] for key, source in wanted.items()}
        info, _ = convert_and_load_state_dict_in_model(model, state, plan)
    _report(part, info, checkpoint.source)
    _tie(part, origin, loaded)
    stale = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if stale:
        raise ValueError(f"{checkpoint.source}: nothing was read for {', '.join(stale[:8])}")


def _wanted_keys(
    model: PreTrainedModel,
    whole_names: dict[str, Any],
    checkpoint: Checkpoint,
    hollow: PreTrainedModel,
) -> dict[str, str]:
    """Return {key: key} of what belongs to the part; refuse keys that no part knows."""
    mapping = get_model_conversion_mapping(hollow)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = hollow.base_model_prefix
    own = model.state_dict().keys()
    ignored = getattr(hollow, "_keys_to_ignore_on_load_unexpected", None) or []
    wanted, strangers = {}, []
    for key in checkpoint.shard_of:
        name, _ = rename_source_key(key, renamings, converters, prefix, whole_names)
        if name not in whole_names and key in whole_names:
            name = key
        if name in own:
            wanted[key] = key
        elif name not in whole_names and not any(re.search(p, key) for p in ignored):
            strangers.append(key)
    if strangers:
        raise ValueError(
            f"{checkpoint.source} has unexpected tensors: {', '.join(sorted(strangers)[:8])}"
        )
    return wanted


def _borrow_tied(
    wanted: dict[str, str], origin: dict[str, int], hollow: PreTrainedModel, checkpoint: Checkpoint
) -> None:
    """Let a tied tensor that the checkpoint stores under its other name be read from there."""
    twins: dict[int, list[str]] = {}
    for name, parameter in hollow.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    prefix = hollow.base_model_prefix + "."
    for name, number in origin.items():
        forms = {name, name.removeprefix(prefix)}
        if forms & wanted.keys() or len(twins.get(number, [])) < 2:
            continue
        for other in twins[number]:
            for form in (other, other.removeprefix(prefix)):
                if form in checkpoint.shard_of:
                    wanted.setdefault(name, form)


def _report(part: Part, info: Any, source: str) -> None:
    problems = []
    ignored = getattr(part.model, "_keys_to_ignore_on_load_missing", None) or []
    missing = [k for k in info.missing_keys if not any(re.search(p, k) for p in ignored)]
    if missing:
        problems.append(f"missing {', '.join(sorted(missing)[:8])}")
    if info.unexpected_keys:
        problems.append(f"unexpected {', '.join(sorted(info.unexpected_keys)[:8])}")
    for name, got, want in sorted(info.mismatched_keys, key=str):
        problems.append(f"{name} has shape {tuple(got)}, must be {tuple(want)}")
    problems += [f"{name}: {why}" for name, why in info.conversion_errors.items()]
    if problems:
        raise ValueError(f"{source} does not fit the {part.role}: {'; '.join(problems)}")


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


def _make_buffers(model: PreTrainedModel, outside: str | None = None) -> None:
    """Compute the buffers that checkpoints leave out (rotary frequencies and the like)."""
    home: dict[str, PreTrainedModel] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PreTrainedModel):
            home[name] = module
        if outside and name.startswith(outside + "."):
            continue
        absent = [k for k, b in module._buffers.items() if b is not None and b.is_meta]
        if not absent:
            continue
        for key in absent:
            buffer = module._buffers[key]
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[key] = torch.full_like(buffer, fill, device="cpu")
        owner = home[max((n for n in home if (name + ".").startswith(n + ".") or not n), key=len)]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            owner._init_weights(module)
        for key in set(absent) & set(module._non_persistent_buffers_set):
            if torch.isnan(module._buffers[key]).any():
                raise ValueError(f"cannot compute the buffer {name}.{key}; load the model whole")
