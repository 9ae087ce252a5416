"""Finds what a folder offers by name: a module each, so that a stranger adds a file and edits none.

`splitfed_v1.py` offers `splitfed-v1`. Modules that begin with an underscore, and `registry`, offer
nothing.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def names(package: str) -> list[str]:
    """Return the names that a package offers, sorted; nothing of it is imported."""
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = (module.name for module in pkgutil.iter_modules(places))
    return sorted(name.replace("_", "-") for name in found if name != "registry" and name[0] != "_")


def load(package: str, name: str) -> ModuleType:
    """Import the module of a name that `names` gave."""
    return import_module(f"{package}.{name.replace('-', '_')}")
