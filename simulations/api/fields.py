"""a request's JSON, field by field: what is read is checked, what is left over is refused"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from simulations.api.errors import ApiError, unsupported, wrong


class Fields:
    """The fields of a request. A field that is null counts as absent, as with OpenAI."""

    def __init__(self, body: Any) -> None:
        if not isinstance(body, Mapping):
            raise ApiError(f"the body is to be a JSON object; this is {_kind(body)}")
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field as it stands."""
        self._known.add(name)
        return self._left.pop(name, default)

    def flag(self, name: str) -> bool:
        """Return a field that is true or false."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise wrong(name, f"{_shown(value)} is neither true nor false", "invalid_type")
        return value

    def text(self, name: str) -> str:
        """Return a field that is a string and must be there."""
        value = self.take(name)
        if value is None:
            raise wrong(name, "is missing", "missing_required_parameter")
        if not isinstance(value, str) or not value:
            raise wrong(name, f"{_shown(value)} is no string with something in it", "invalid_type")
        return value

    def whole(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Return a field that is a whole number."""
        value = self.take(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, f"{_shown(value)} is no whole number", "invalid_type")
        return int(_between(name, value, low, high))

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """Return a field that is a number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, f"{_shown(value)} is no number", "invalid_type")
        return float(_between(name, value, low, high))

    def only(self, name: str, *harmless: Any, why: str) -> None:
        """Refuse a field unless it asks for nothing that is not done here."""
        value = self.take(name)
        if value is not None and value not in harmless:
            raise unsupported(name, f"{_shown(value)} {why}")

    def finish(self) -> None:
        """Refuse what no one asked for: it might have changed what is meant."""
        for name in self._left:
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ApiError(
                f"unrecognised request argument: {name}{hint}", param=name, code="unknown_parameter"
            )


def _between(name: str, value: float, low: float, high: float) -> float:
    if not math.isfinite(value) or not low <= value <= high:
        raise wrong(name, f"{value} is not between {low} and {high}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
