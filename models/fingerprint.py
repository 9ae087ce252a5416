"""Tell whether two sources are the same weights of the same model, by a little of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from models.shards import Shards
from models.source import ADAPTER_WEIGHTS, read_settings

SAMPLES, BYTES = 16, 4096
"""Pieces of a tensor that are looked at, and how long each is; a smaller tensor is read whole."""
_OF_THE_WRITER = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache",
                  "architectures", "base_model_name_or_path", "inference_mode", "peft_version",
                  "auto_mapping", "revision")  # fmt: skip


def fingerprint(base: str, adapter: Path | None = None) -> str:
    """Return a hash of a whole model, with an adapter of it or without.

    Parameters
    ----------
    base : str
        Folder, hub id or .gguf file. Of a hub id all shards are fetched.
    adapter : Path, optional
        Folder of a PEFT adapter.

    Returns
    -------
    str
        32 hexadecimal digits of a SHA-256 over the configuration and the name, type, shape and
        data of each tensor; how the tensors are divided into files does not matter.

    Notes
    -----
    Of a tensor of more than 64 KiB, 16 pieces of 4 KiB count, evenly apart: a change that touches
    none of them is missed, such as a few rows of an embedding that were edited by hand. Training
    and merging change every piece. The other way round, the same numbers kept in another way have
    another fingerprint: an adapter merged into its base, another type, a .gguf file. It tells
    models that were mixed up, and is no defence against who wants to mislead.
    """
    digest = hashlib.sha256(b"graft fingerprint 1")
    if base.endswith(".gguf"):
        with Path(base).expanduser().open("rb") as file:
            size = Path(base).expanduser().stat().st_size
            for piece in _pieces(file, 0, size, samples=64 * SAMPLES):
                digest.update(piece)
    else:
        shards = Shards.find(base)
        config = shards.file("config.json")
        assert config is not None  # the model's source was found by it
        _add_settings(digest, json.loads(config.read_text(encoding="utf-8")))
        files = [shards.file(name) for name in sorted(set(shards.shard_of.values()))]
        _add_tensors(digest, [file for file in files if file is not None])
    if adapter is not None:
        _add_settings(digest, read_settings(adapter))
        _add_tensors(digest, [adapter / ADAPTER_WEIGHTS])
    return digest.hexdigest()[:32]


def fingerprint_of(files: Iterable[Path]) -> str:
    """Return such a hash of the tensors of some safetensors files alone."""
    digest = hashlib.sha256(b"graft tensors 1")
    _add_tensors(digest, files)
    return digest.hexdigest()[:32]


def _add_settings(digest: Any, settings: dict[str, Any]) -> None:
    """Add a configuration, apart from what says who wrote it and where."""
    kept = {key: value for key, value in settings.items() if key not in _OF_THE_WRITER}
    for key in ("target_modules", "target_parameters"):  # sets, which PEFT writes in any order
        if isinstance(kept.get(key), list):
            kept[key] = sorted(kept[key])
    digest.update(json.dumps(kept, sort_keys=True).encode())


def _add_tensors(digest: Any, files: Iterable[Path]) -> None:
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in files:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found.update({name: (path, 8 + length, told) for name, told in header.items()})
    for name, (path, start, told) in sorted(found.items()):
        digest.update(json.dumps([name, told["dtype"], told["shape"]]).encode())
        first, last = told["data_offsets"]
        with path.open("rb") as file:
            for piece in _pieces(file, start + first, last - first):
                digest.update(piece)


def _pieces(file: BinaryIO, start: int, size: int, *, samples: int = SAMPLES) -> Iterator[bytes]:
    """Yield what is looked at of `size` bytes from `start` on."""
    if size <= samples * BYTES:
        file.seek(start)
        yield file.read(size)
        return
    for number in range(samples):
        file.seek(start + number * (size - BYTES) // (samples - 1))
        yield file.read(BYTES)
