"""One or two parts of a model as a folder that holds no other: what a client, or a server, needs.

`config.json` is the whole model's, `trunk.safetensors` or `ends.safetensors` the tensors by their
names in the whole model (a tied one once), `graft.json` says what they are.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from models.anatomy import examine
from models.buffers import make_buffers
from models.cut import Cut
from models.families import require_tested
from models.fingerprint import fingerprint_of
from models.parts import Part, split_unchecked
from models.state import copy_into
from models.verify import check_twin
from models.whole import build_hollow, build_scratch, parse_attention, parse_dtype, read_config

__all__ = ["ENDS", "LABEL", "TRUNK", "Label", "load_pieces", "read_label", "save_pieces"]

FORMAT = 1
LABEL = "graft.json"
TRUNK, ENDS = "trunk", "ends"
ROLES_OF = {TRUNK: ("trunk",), ENDS: ("bottom", "top")}


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a folder of parts says of itself."""

    kind: str
    """``trunk``, or ``ends``: bottom and top."""
    name: str
    """Of the model."""
    cut: Cut
    fingerprint: str
    """Of the whole model that the parts were cut from (`models.fingerprint`)."""
    description: str
    hidden_size: int
    num_blocks: int
    """Of the whole model."""
    allow_untested: bool = False


def save_pieces(
    folder: Path, parts: Sequence[Part], config: PretrainedConfig, label: Label
) -> Path:
    """Save a trunk, or bottom and top, by themselves.

    Parameters
    ----------
    folder : Path
        Created if need be.
    parts : sequence of Part
        Without adapters; those of `label.kind`.
    config : PretrainedConfig
        Of the whole model.
    label : Label
        What is said of them.

    Raises
    ------
    ValueError
        If they are other parts than the label says, or an adapter is not merged.
    """
    if tuple(part.role for part in parts) != ROLES_OF[label.kind]:
        raise ValueError(f"{label.kind} is {' and '.join(ROLES_OF[label.kind])}, not these parts")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _state(parts)
    path = folder / f"{label.kind}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    config.save_pretrained(folder)
    told = {
        "format": FORMAT,
        **dataclasses.asdict(label),
        "tensors": {"file": path.name, "digest": fingerprint_of([path])},
    }
    (folder / LABEL).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return folder


def read_label(folder: Path) -> Label:
    """Read what a folder of parts says of itself.

    Raises
    ------
    ValueError
        If it says nothing that this version of Graft understands.
    """
    told = _told(folder)
    try:
        fields = {name: told[name] for name in Label.__dataclass_fields__}
        label = Label(**{**fields, "cut": Cut(**fields["cut"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / LABEL} does not say what it must: {error}") from error
    if label.kind not in ROLES_OF:
        raise ValueError(f"{folder / LABEL}: kind is {label.kind!r}, must be trunk or ends")
    return label


def load_pieces(
    folder: Path, *, dtype: str = "float32", attention: str = "sdpa", device: str = "cpu"
) -> list[Part]:
    """Load what `save_pieces` saved, strictly: the trunk, or bottom and top.

    Returns
    -------
    list[Part]
        In evaluation mode; tied weights are one Parameter.

    Raises
    ------
    ValueError
        If a tensor is missing, unexpected, of another shape, or not what was saved.
    """
    label, config = read_label(folder), read_config(str(folder))
    how = parse_attention(attention, config)
    if not require_tested(config, label.allow_untested):
        check_twin(config, label.cut)
    kind = parse_dtype(dtype)
    hollow = build_hollow(config, dtype=kind, attn_implementation=how)
    anatomy, state = examine(hollow), _read(folder, label)
    plan = hollow._get_dtype_plan(kind)
    parts = [Part(hollow, role, label.cut, anatomy) for role in ROLES_OF[label.kind]]
    for part in parts:
        make_buffers(part.model)
    _fill(parts, {name: _typed(name, t, kind, plan) for name, t in state.items()}, folder)
    return [part.to(device).eval() for part in parts]


def load_joined(trunk: Path, ends: Path, *, dtype: str, attention: str) -> PreTrainedModel:
    """Put the whole model together of its parts' folders; on the CPU, in evaluation mode."""
    config, label = read_config(str(ends)), read_label(ends)
    model = build_scratch(config, 0, dtype=dtype, attention=parse_attention(attention, config))
    pieces = [
        *load_pieces(ends, dtype=dtype, attention=attention),
        *load_pieces(trunk, dtype=dtype, attention=attention),
    ]
    held = {name: tensor for part in pieces for name, tensor in part.model.state_dict().items()}
    for part in split_unchecked(model, label.cut):
        own = part.model.state_dict(keep_vars=True)
        copy_into(own, {name: held[name] for name in own}, part.role)
    return model.eval()


def _state(parts: Sequence[Part]) -> dict[str, Tensor]:
    """All tensors of some parts by their names in the whole model, a tied one once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for part in parts:
        for name, tensor in part.model.state_dict(keep_vars=True).items():
            if "lora_" in name:
                raise ValueError(f"{name} is of an adapter: merge it before the part is saved")
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor.detach().cpu().contiguous().clone()
    return found


def _told(folder: Path) -> dict[str, Any]:
    path = folder / LABEL
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        version = told.get("format") if isinstance(told, dict) else None
        raise ValueError(
            f"{path} has format {version}, and this Graft reads {FORMAT}: export the parts anew"
        )
    return told


def _read(folder: Path, label: Label) -> dict[str, Tensor]:
    """The tensors of a folder, found to be what was saved."""
    path = folder / f"{label.kind}.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} lacks {path.name}: copy the whole folder")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; copy it anew") from error
    if fingerprint_of([path]) != _told(folder)["tensors"]["digest"]:
        raise ValueError(f"{path} is not the file that {LABEL} was written with: copy both anew")
    return state


def _fill(parts: Sequence[Part], state: Mapping[str, Tensor], folder: Path) -> None:
    """Give parts without memory their tensors; what was one parameter is one again."""
    first: dict[int, torch.nn.Parameter] = {}
    own = {name for part in parts for name in part.model.state_dict()}
    if strange := sorted(state.keys() - own):
        raise ValueError(f"{folder} has unexpected tensors: {', '.join(strange[:8])}")
    for part in parts:
        for name, tensor in part.model.state_dict(keep_vars=True).items():
            module = part.model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            if leaf in module._parameters and id(tensor) in first:
                module._parameters[leaf] = first[id(tensor)]
                continue
            if name not in state:
                raise ValueError(f"{folder} lacks {name}, which the {part.role} needs")
            if state[name].shape != tensor.shape:
                shapes = f"{tuple(state[name].shape)}, must be {tuple(tensor.shape)}"
                raise ValueError(f"{folder}: {name} has shape {shapes}")
            if leaf in module._parameters:
                first[id(tensor)] = torch.nn.Parameter(state[name], tensor.requires_grad)
                module._parameters[leaf] = first[id(tensor)]
            else:
                module._buffers[leaf] = state[name]


def _typed(name: str, tensor: Tensor, kind: torch.dtype, plan: Mapping[str, torch.dtype]) -> Tensor:
    """A tensor in the type that the model holds it in: some families keep a few in fp32."""
    if not tensor.is_floating_point():
        return tensor
    kept = [at for at in plan if re.search(rf"(^|\.){re.escape(at)}(\.|$)", name)]
    return tensor.to(plan[kept[0]] if kept else kind)
