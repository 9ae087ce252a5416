"""Find tensors in a safetensors checkpoint, in a folder or on the hub, without reading them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass
class Shards:
    """A checkpoint whose shards are fetched and opened only when asked for."""

    source: str
    """Folder or hub id."""
    shard_of: dict[str, str] = field(default_factory=dict)
    """Name of the file that holds a key, for every key."""

    @classmethod
    def find(cls, source: str) -> Shards:
        """List the keys of a checkpoint.

        Raises
        ------
        ValueError
            If there are no safetensors (only they let a role read its own tensors alone), or
            they are damaged.
        """
        checkpoint = cls(source)
        if (index := checkpoint.file(INDEX)) is not None:
            checkpoint.shard_of = _read_index(index)
            return checkpoint
        single = checkpoint.file(SINGLE)
        if single is None:
            raise ValueError(_no_safetensors(source, checkpoint.file))
        with _opened(single) as opened:
            checkpoint.shard_of = dict.fromkeys(opened.keys(), SINGLE)
        return checkpoint

    def file(self, name: str) -> Path | None:
        """Return the path of one file of the checkpoint, fetched if need be; None if absent."""
        folder = Path(self.source)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.source, name))
        except EntryNotFoundError:
            return None

    def slices(self, keys: Iterable[str], stack: ExitStack) -> dict[str, Any]:
        """Return lazy slices of `keys`; their files stay open until `stack` is closed.

        Raises
        ------
        ValueError
            If a shard that is needed is absent, or does not hold what the index says.
        """
        wanted: dict[str, list[str]] = {}
        for key in keys:
            wanted.setdefault(self.shard_of[key], []).append(key)
        found: dict[str, Any] = {}
        for name, own in sorted(wanted.items()):
            path = self.file(name)
            if path is None:
                raise ValueError(f"{self.source}: shard {name} is missing; it holds {own[0]}")
            opened = stack.enter_context(_opened(path))
            present = set(opened.keys())
            if absent := sorted(set(own) - present):
                raise ValueError(f"{path} lacks {', '.join(absent[:8])}, which the index promises")
            found.update({key: opened.get_slice(key) for key in own})
        return found


def _no_safetensors(source: str, file: Callable[[str], Path | None]) -> str:
    pickled = next((name for name in PICKLED if file(name)), None)
    if pickled is None:
        return f"{source} has no weights: neither {SINGLE} nor {INDEX}"
    return (
        f"{source} holds its weights in {pickled}; a role can read its own tensors only from "
        'safetensors. Convert it once: python -c "from transformers import AutoModelForCausalLM, '
        f"AutoTokenizer; p, q = '{source}', '{source.rstrip('/')}-safetensors'; "
        "AutoModelForCausalLM.from_pretrained(p, dtype='auto').save_pretrained(q); "
        'AutoTokenizer.from_pretrained(p).save_pretrained(q)"'
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no index of shards ({type(error).__name__}: {error}); download it anew"
        ) from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(20) == b"version https://git-":
                raise ValueError(
                    f"{path} is a pointer of git LFS: fetch it (git lfs pull)"
                ) from None
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
