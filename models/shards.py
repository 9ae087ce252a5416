"""Find tensors in a safetensors checkpoint, in a folder or on the hub, without reading them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass
class Checkpoint:
    """A checkpoint whose shards are fetched and opened only when asked for."""

    source: str
    """Folder or hub id."""
    shard_of: dict[str, str] = field(default_factory=dict)
    """Name of the file that holds a key, for every key."""

    @classmethod
    def find(cls, source: str) -> Checkpoint:
        """List the keys of a checkpoint.

        Raises
        ------
        ValueError
            If there are no safetensors; only they let a role read its own tensors alone.
        """
        checkpoint = cls(source)
        if (index := checkpoint.file(INDEX)) is not None:
            checkpoint.shard_of = dict(json.loads(index.read_text())["weight_map"])
            return checkpoint
        single = checkpoint.file(SINGLE)
        if single is None:
            raise ValueError(
                f"{source} has neither {SINGLE} nor {INDEX}; a role can read its own tensors only "
                "from safetensors: load the model with transformers and call save_pretrained once"
            )
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


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
