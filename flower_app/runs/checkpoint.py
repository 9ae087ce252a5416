"""A run between two rounds, on disk: written whole or not at all, and never believed unchecked.

`checkpoints/round-0003/` holds `tensors.safetensors` and `state.json`, which says everything else:
the configuration, who took part, where each tensor belongs, and what both files must hash to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conf import VERSION
from flower_app.runs.flatten import flatten, unflatten
from flower_app.runs.folders import CHECKPOINTS, folders, round_of
from flower_app.runs.journal import replace_whole

FORMAT = 1
STATE, TENSORS = "state.json", "tensors.safetensors"
_DRAFT = ".draft-"


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint says of itself and the run, besides the state."""

    round: int
    config: dict[str, Any]
    clients: list[str]
    """Names of those who were connected."""
    loss: float | None
    """Held-out loss of the round; None too as long as it is not evaluated."""
    started: str
    seconds: float
    """What the run had taken by then."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read and found whole."""

    folder: Path
    facts: Facts
    torch: str
    """The version of torch that wrote it."""
    state: dict[str, Any]
    """As the strategy gave it; empty if it was only checked."""


def write(run: Path, facts: Facts, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint so that a kill at any moment leaves it whole or not there.

    Parameters
    ----------
    run : Path
        The run folder.
    facts : Facts
        What is said of it.
    state : mapping
        Nested, as `flower_app.runs.flatten` takes it.

    Returns
    -------
    Path
        Its folder.

    Raises
    ------
    OSError
        If the disk is full, for instance; what was begun is removed then.
    """
    parent = run / CHECKPOINTS
    final, draft = parent / f"round-{facts.round:04d}", parent / f"{_DRAFT}{facts.round:04d}"
    try:
        if not parent.is_dir():
            parent.mkdir()
            _sync(run)
        clean(run)
        draft.mkdir()
        _write_files(draft, facts, state)
        remove(final)
        draft.rename(final)
        _sync(parent)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def amend(run: Path, facts: Facts, state: Mapping[str, Any]) -> None:
    """Replace what the checkpoint of a round says, at once; its tensors are still those of `state`.

    Raises
    ------
    OSError
        If it cannot be written; what it said stays.
    """
    folder = run / CHECKPOINTS / f"round-{facts.round:04d}"
    try:
        told = _read_state(folder / STATE)
    except Damaged:
        write(run, facts, state)
        return
    replace_whole(folder / STATE, _statement(facts, told["tensors"], flatten(state)[1]))
    _sync(folder)


def read(folder: Path, *, load: bool = True) -> Checkpoint:
    """Read a checkpoint and check every byte of it.

    Parameters
    ----------
    folder : Path
        `checkpoints/round-...` of a run.
    load : bool
        Return its state too.

    Raises
    ------
    Damaged
        If it is not what was written, with what is wrong.
    ValueError
        If it is no checkpoint, or another Graft's.
    """
    if not (folder / STATE).is_file():
        named = round_of(folder) is not None and folder.is_dir()
        kind = Damaged if named else ValueError
        raise kind(f"{folder} is no checkpoint: it has no {STATE}")
    told = _read_state(folder / STATE)
    if told["graft"] != VERSION:
        raise ValueError(
            f"{folder} was written by Graft {told['graft']}, and this is {VERSION}, whose numbers "
            f"may be others: go on with Graft {told['graft']}"
        )
    _check_tensors(folder / TENSORS, told["tensors"])
    state = {}
    if load:
        # Copies, for tensors that lie in the mapped file are aligned as it pleases.
        tensors = {name: t.clone() for name, t in load_file(folder / TENSORS).items()}
        state = unflatten(tensors, told["plan"])
    facts = Facts(**{name: told[name] for name in Facts.__dataclass_fields__})
    return Checkpoint(folder=folder, facts=facts, torch=told["torch"], state=state)


def prune(run: Path, keep: int) -> None:
    """Remove all checkpoints but the last ones and that of the best held-out loss."""
    there = folders(run)
    losses = {path: loss for _, path in there if (loss := _loss(path)) is not None}
    best = min(losses, key=lambda path: losses[path]) if losses else None
    for _, path in there[:-keep]:
        if path != best:
            remove(path)


def remove(folder: Path) -> None:
    """Remove a checkpoint; half of one never bears its name."""
    if folder.exists():
        gone = folder.with_name(f"{_DRAFT}gone-{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def clean(run: Path) -> None:
    """Remove what a kill left of a checkpoint that was being written or removed."""
    for path in (run / CHECKPOINTS).glob(f"{_DRAFT}*"):
        shutil.rmtree(path, ignore_errors=True)


def _write_files(draft: Path, facts: Facts, state: Mapping[str, Any]) -> None:
    tensors, plan = flatten(state)
    own = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path = draft / TENSORS
    try:
        save_file(_apart(own), path)
    except SafetensorError as error:
        # It wraps the system's error in words; ours are told apart by their number.
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    size, digest = _digest(path)
    text = _statement(facts, {"bytes": size, "sha256": digest}, plan)
    (draft / STATE).write_text(text, encoding="utf-8")
    for name in (TENSORS, STATE):
        _sync(draft / name)
    _sync(draft)


def _statement(facts: Facts, tensors: Mapping[str, Any], plan: Any) -> str:
    """The text of `state.json`."""
    told = {
        "format": FORMAT,
        "graft": VERSION,
        "torch": torch.__version__,
        **vars(facts),
        "tensors": tensors,
        "plan": plan,
    }
    return json.dumps({"checksum": _checksum(told), **told}, allow_nan=False, indent=1) + "\n"


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors none of which shares memory with another, which safetensors refuses."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return tensors


def _read_state(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Damaged(f"{path.parent} is damaged: {STATE} is no JSON ({error})") from error
    if not isinstance(told, dict) or "format" not in told:
        raise Damaged(f"{path.parent} is damaged: {STATE} says no format")
    if told["format"] != FORMAT:
        raise ValueError(
            f"{path.parent} has format {told['format']}, and this Graft reads {FORMAT}: go on with "
            f"the Graft that wrote it ({told.get('graft')})"
        )
    checksum = told.pop("checksum", None)
    if checksum != _checksum(told):
        raise Damaged(f"{path.parent} is damaged: {STATE} has changed since it was written")
    return told


def _check_tensors(path: Path, told: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise Damaged(f"{path.parent} is damaged: {TENSORS} is missing")
    size, digest = _digest(path)
    if size != told["bytes"]:
        raise Damaged(
            f"{path.parent} is damaged: {TENSORS} has {size} bytes, {told['bytes']} were written"
        )
    if digest != told["sha256"]:
        raise Damaged(f"{path.parent} is damaged: {TENSORS} has changed since it was written")


def _loss(folder: Path) -> float | None:
    with contextlib.suppress(ValueError, OSError):
        loss: float | None = _read_state(folder / STATE)["loss"]
        return loss
    return None


def _checksum(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
