"""Finds what a folder offers: a new policy or codec is one new file in it, named nowhere else."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def kinds(package: str, base: type[T]) -> dict[str, type[T]]:
    """The subclasses of `base` that the modules of a package define, by their `name`.

    Parameters
    ----------
    package : str
        Dotted name of the folder; its modules are imported.
    base : type
        What is looked for; a class without a `name` of its own is no kind.
    """
    folder = importlib.import_module(package)
    found: dict[str, type[T]] = {}
    for module in pkgutil.iter_modules(folder.__path__, f"{package}."):
        for value in vars(importlib.import_module(module.name)).values():
            if not (inspect.isclass(value) and issubclass(value, base)):
                continue
            if value.__module__ == module.name and (name := vars(value).get("name", "")):
                found[name] = value
    return dict(sorted(found.items()))


def chosen(found: Mapping[str, T], name: str, key: str) -> T:
    """What is found under `name`, which `key` of the configuration gave; else a `ValueError`."""
    if name in found:
        return found[name]
    near = difflib.get_close_matches(name, found, n=1)
    remedy = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{key} must be one of {', '.join(found)}, got {name!r}{remedy}")
