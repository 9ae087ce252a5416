"""Where a model comes from: what `model.path` and `model.base` name, told before anything is read.

A folder of a checkpoint, a hub id, a ``.gguf`` file, or the folder of a PEFT adapter, whose base is
the model that it names itself, or another one that the user names.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.places import follow
from models.shards import Shards

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MERGE = (
    'python -c "from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained('{0}').merge_and_unload().save_pretrained('{0}-merged')\""
)


@dataclass(frozen=True)
class Source:
    """What training starts from."""

    base: str
    """Folder, hub id or .gguf file of a whole model."""
    adapter: Path | None = None
    """Folder of an adapter of it."""


def find_source(path: str, base: str = "", *, key: str = "model.path") -> Source:
    """Find out what a path names.

    Parameters
    ----------
    path : str
        Folder, hub id or .gguf file.
    base : str
        Of the adapter at `path`, if that is one; empty: the one that it names.
    key : str
        What the path is called in errors.

    Raises
    ------
    ValueError
        If there is no such thing, or it is not a model that parts can be read from.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if place.suffix == ".gguf" or not _HUB_ID.fullmatch(path):
            raise ValueError(f"{key} {path} does not exist")
    elif place.is_file():
        if place.suffix != ".gguf":
            raise ValueError(f"{key} {path} is a file: give the model's folder, or a .gguf file")
    elif (place / ADAPTER_CONFIG).is_file():
        return _find_adapted(place, base)
    else:
        _check_folder(place, key)
    if base:
        raise ValueError(
            f"model.base ({base!r}) is for adapters, and {key} {path} is none: clear it"
        )
    return Source(str(place) if place.exists() else path)


def find_model(path: str, *, key: str) -> str:
    """Find a whole model by its path; refuse, beside what `find_source` does, an adapter of one."""
    source = find_source(path, key=key)
    if source.adapter is not None:
        raise ValueError(f"{key} {path} is an adapter: give its base, which is {source.base}")
    return source.base


def tokenizer_of(path: str, base: str = "") -> str:
    """Return where the tokenizer of a model is: beside it; an adapter may have that of its base."""
    folder = Path(path).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file() or any(folder.glob("tokenizer*")):
        return path
    return find_source(path, base).base


def generation_settings(path: str) -> Path | None:
    """Return the file that says how a model generates if it is not told; None if it has none."""
    return None if path.endswith(".gguf") else Shards(path).file("generation_config.json")


def _check_folder(folder: Path, key: str) -> None:
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        raise ValueError(f"{key} {folder} is an empty folder")
    if "config.json" not in names:
        inside = [n for n in names if any((folder / n / c).exists() for c in _CONFIGS)]
        inside += [n for n in names if n.endswith(".gguf")]
        hint = f"; did you mean {folder / inside[0]}?" if inside else ""
        raise ValueError(
            f"{key} {folder} is no model: it has no config.json, but {', '.join(names[:5])}{hint}"
        )
    Shards.find(str(folder))


_CONFIGS = ("config.json", ADAPTER_CONFIG)


def _find_adapted(folder: Path, base: str) -> Source:
    settings = read_settings(folder)
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} is an adapter of type {settings.get('peft_type')}; Graft starts from LoRA. "
            f"Merge it into its base once: {_MERGE.format(folder)}"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"the adapter {folder} has no {ADAPTER_WEIGHTS}; save it with PEFT anew")
    name = base or follow(settings.get("base_model_name_or_path") or "", folder.absolute())
    if not name:
        raise ValueError(f"the adapter {folder} does not name its base; set model.base to it")
    try:
        found = find_source(name, key="its base")
    except ValueError as error:
        remedy = "correct model.base" if base else "set model.base to where that model is now"
        raise ValueError(f"model.path {folder} is an adapter, and {error}; {remedy}") from error
    if found.adapter is not None:
        raise ValueError(
            f"model.path {folder} is an adapter of {name}, which is an adapter itself. Merge that "
            f"one once, and set model.base to the result: {_MERGE.format(name)}"
        )
    return Source(found.base, folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read what an adapter says of itself."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / ADAPTER_CONFIG} is not an adapter's configuration")
    return settings
