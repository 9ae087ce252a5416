"""JSON, read as it stands in the file: line by line, or one array; nothing is inferred."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from flower_app.data.files import read_lines, read_text, suffix
from flower_app.data.refusals import NAME, DataError


class _Number(float):
    """A number with a point or an exponent, and how it is written."""

    text: str


class _NoNumber(float):
    """NaN or Infinity, which JSON does not have."""


class _Twice(ValueError):
    """An object in which one key stands twice."""


def read_json(
    path: Path, wanted: Collection[str]
) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Yield every row of a JSON file: its place, its wanted columns, and the names of all.

    A number in a column is text where Python would write it otherwise (2.50, 1e5).

    Raises
    ------
    DataError
        At the first place that is not JSON, or no object, or has a key twice.
    """
    found = _entries(path) if suffix(path) == ".json" else None
    for place, row, text in found if found is not None else _lines(path):
        if not isinstance(row, dict):
            raise DataError(f"{place} is not a JSON object, got {type(row).__name__}")
        kept = {name: _as_written(row[name]) for name in wanted if name in row}
        if "NaN" in text or "Infinity" in text or "\\ud" in text.lower():
            _check(kept, place)
        yield place, kept, list(row)


def _lines(path: Path) -> Iterator[tuple[str, Any, str]]:
    for number, line in enumerate(read_lines(path), start=1):
        line = line.rstrip("\n")
        if line.strip():
            place = f"{path}, line {number}"
            try:
                value = _parse(line, place)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place} is not JSON: {_words(error)} at character {error.colno} of "
                    f"{len(line)}{_hint(path, number, line)}"
                ) from None
            yield place, value, line


def _entries(path: Path) -> list[tuple[str, Any, str]] | None:
    """Return the entries of an array, or the one value; None if the file has one value a line."""
    text = read_text(path)
    if not text.strip():
        return []
    try:
        value = _parse(text, str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise DataError(f"{where} is not JSON: {_words(error)}") from None
    rows = value if isinstance(value, list) else [value]
    return [(f"{path}, entry {number}", row, text) for number, row in enumerate(rows, start=1)]


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_float=_number, parse_constant=_NoNumber
        )
    except json.JSONDecodeError:
        raise
    except _Twice as error:
        key = str(error)
        shown = repr(key) if NAME.fullmatch(key) else "(not shown)"
        raise DataError(
            f"{place} cannot be read as json: the key {shown} stands twice in one object"
        ) from None
    except RecursionError:
        raise DataError(f"{place} cannot be read as json: it is nested too deeply") from None
    except ValueError:  # Python reads no whole number of more than 4300 digits
        raise DataError(f"{place} cannot be read as json: it has too long a number") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


def _number(text: str) -> _Number:
    value = _Number(text)
    value.text = text
    return value


def _as_written(value: Any) -> Any:
    if isinstance(value, _Number):
        return float(value) if repr(float(value)) == value.text else value.text
    return value


def _check(value: Any, place: str) -> None:
    """Refuse what is no JSON, or no text, in the columns that are used."""
    if isinstance(value, _NoNumber):
        raise DataError(f"{place} holds NaN or Infinity, which is not JSON: write null, or a text")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise DataError(f"{place} holds half a surrogate pair (\\ud800 to \\udfff), no text")
    for inner in value.values() if isinstance(value, dict) else ():
        _check(inner, place)
    for inner in value if isinstance(value, list) else ():
        _check(inner, place)


def _hint(path: Path, number: int, line: str) -> str:
    if number == 1 and line.strip() in ("[", "{"):
        return f"; if it is one value over many lines, name it {path.with_suffix('.json').name}"
    return ""


def _words(error: json.JSONDecodeError) -> str:
    # After a colon, or in quotes, it may show a character of the text.
    return re.split(r"[:'\"]", error.msg)[0].strip().removesuffix(" at")
