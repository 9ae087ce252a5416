"""keys that files and checkpoints of before have by another name"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.rules import ConfigError

RENAMED = {"link.dtype": "link.codec"}
"""By the name before; its values mean the same under the new one."""


def with_new_names(tree: Any, source: str) -> tuple[Any, list[str]]:
    """Return a tree of sections by today's names, and what to tell of those that were others.

    Parameters
    ----------
    tree : Any
        As a file or a checkpoint has it; anything but a mapping of mappings is left as it is.
    source : str
        Where it came from, for the message.

    Raises
    ------
    ConfigError
        If a key is there by both names.
    """
    notes = []
    for old, new in RENAMED.items():
        section, _, before = old.partition(".")
        inside = tree.get(section) if isinstance(tree, Mapping) else None
        if not isinstance(inside, Mapping) or before not in inside:
            continue
        name = new.partition(".")[2]
        if name in inside:
            raise ConfigError(
                f"{source} has {old} beside {new}, which is its name now: keep {new}", key=new
            )
        renamed = {name if key == before else key: value for key, value in inside.items()}
        tree = {**tree, section: renamed}
        notes.append(f"{old} is {new} now, and is read as that")
    return tree, notes
