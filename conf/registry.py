"""Finds what a folder offers by name: a module each, so that a stranger adds a file and edits none.

`splitfed_v1.py` offers `splitfed-v1`. Modules that begin with an underscore, and `registry`, offer
nothing.
"""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")

_OWN_NAME = re.compile(r'^    name = "([\w-]+)"$', re.MULTILINE)


def names(package: str) -> list[str]:
    """Return the names that a package offers, sorted; nothing of it is imported."""
    found = (module.name for module in pkgutil.iter_modules(_places(package)))
    return sorted(name.replace("_", "-") for name in found if name != "registry" and name[0] != "_")


def declares(package: str, name: str) -> bool:
    """Whether a class of the package gives itself this name in its source, which is not imported.

    False is no refusal: `kinds` knows those, too, that come by their name in another way.
    """
    sources = (file.read_text("utf-8") for at in _places(package) for file in Path(at).glob("*.py"))
    return any(name in _OWN_NAME.findall(source) for source in sources)


def kinds(package: str, base: type[T]) -> dict[str, type[T]]:
    """Import what a package offers; return the subclasses of `base` in it, by their `name`.

    A class that has no `name` of its own is a helper, and a module may hold nothing but helpers.
    """
    found: dict[str, type[T]] = {}
    for module in (load(package, name) for name in names(package)):
        for value in vars(module).values():
            if not (isinstance(value, type) and issubclass(value, base)):
                continue
            if value.__module__ == module.__name__ and (own := vars(value).get("name", "")):
                found[own] = value
    return dict(sorted(found.items()))


def load(package: str, name: str) -> ModuleType:
    """Import the module of a name that `names` gave."""
    return import_module(f"{package}.{name.replace('-', '_')}")


def _places(package: str) -> list[str]:
    spec = find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec else []
