"""Paths that were written down before the folders around them moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.schema import Config

NEAR = 3
"""Folders above one that are looked through for what it was beside."""
_KEYS = ("path", "base", "tokenizer")


def follow(path: str, folder: Path) -> str:
    """Return `path`, or where it went together with `folder`, which refers to it.

    Parameters
    ----------
    path : str
        Only an absolute one that is not there any more is looked for: under the folders above
        `folder`, by as many of its last names as there are, at least two.
    folder : Path
        Absolute.
    """
    place = Path(path).expanduser()
    if not place.is_absolute() or place.exists():
        return path
    ends = [Path(*place.parts[first:]) for first in range(1, len(place.parts) - 1)]
    there = (above / end for above in folder.parents[:NEAR] for end in ends)
    return next((str(found) for found in there if found.exists()), path)


def follow_model(config: Config, folder: Path) -> tuple[Config, list[str]]:
    """Return a configuration of `folder` whose model is where it went, and what to tell of that."""
    told = {key: getattr(config.model, key) for key in _KEYS}
    found: dict[str, Any] = {key: follow(path, folder) for key, path in told.items()}
    moved = {key: path for key, path in found.items() if path != told[key]}
    notes = [f"model.{key} was {told[key]} and is read from {now}" for key, now in moved.items()]
    return replace(config, model=replace(config.model, **moved)), notes
