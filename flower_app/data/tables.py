"""Tables and texts from files, read strictly and refused without quoting what they hold."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

# Library messages that may be passed on: as a whole, they leave no room for content.
_SAFE = re.compile(
    r"(Error tokenizing data\. C error: )?"
    r"(Expected \d+ fields in line \d+, saw \d+|EOF inside string starting at row \d+)"
    r"|No columns to parse from file"
    r'|Instruction "train" corresponds to no data!'
    r"|Parquet magic bytes not found in footer\. Either the file is corrupted or this is not a "
    r"parquet file\."
)
# A CSV without a header has its first row for names, so only what looks like a name is shown.
NAME = re.compile(r"[^\W\d][\w.-]{0,31}")


class DataError(ValueError):
    """Data that cannot be used, in words that quote none of it."""


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file} is not UTF-8 text, in line {line}") from None


def load_tables(kind: str, files: list[Path]) -> Dataset:
    options: dict[str, Any] = {}
    try:
        if kind == "csv":
            headers = [_check_csv(file) for file in files]
            _check_same_columns(files, headers)
            # As text: pandas would turn 007 into 7 and the word NA into nothing.
            options = {"features": Features({name: Value("string") for name in headers[0]}),
                       "keep_default_na": False}  # fmt: skip
        with quiet():
            return datasets.load_dataset(
                kind, data_files=[str(file) for file in files], split="train", **options
            )
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - its text may quote data
        names, why = ", ".join(map(str, files)), reason(error)
        texts = [read_text(file) for file in files] if kind != "parquet" else []
        if why.startswith('Instruction "train"'):
            raise DataError(f"{names} holds no documents") from None
        if kind == "json":
            _check_same_columns(files, [*map(_find_bad_json, files, texts)])
        raise DataError(f"{names} cannot be read as {kind}: {why}") from None


def _check_csv(path: Path) -> list[str]:
    """Return the names of the columns, as pandas gives them, if every row has as many fields.

    pandas takes surplus fields for an index, which shifts the columns, and fills up missing ones.
    """
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131072 characters of csv
    header: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, line = csv.reader(file), 1
        for row in reader:
            if len(row) > 1 or "".join(row).strip():
                header = header or row
                if len(row) != len(header):
                    fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
                    raise DataError(
                        f"{path}, line {line} has {fields}, the header {len(header)}"
                        + (separator(header) or "; quote commas within a field, close all quotes")
                    )
            line = reader.line_num + 1
    if double := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"{path} has several columns of one name: {shown_names(double)}")
    return [name or f"Unnamed: {index}" for index, name in enumerate(header)]


def separator(columns: list[str]) -> str:
    """Return a hint if the columns of a CSV seem to be separated by something else."""
    found = re.search(r"[;\t|]", columns[0]) if len(columns) == 1 else None
    return f"; is the separator {found[0]!r}? only commas are read" if found else ""


def _check_same_columns(files: list[Path], columns: Sequence[Collection[str]]) -> None:
    for path, names in zip(files, columns, strict=True):
        if differing := set(columns[0]) ^ set(names):
            raise DataError(
                f"{path} and {files[0]} must have the same columns, but only one has "
                f"{shown_names(sorted(differing))}"
            )


def reason(error: Exception) -> str:
    """Return why a library failed, in words that cannot hold data: its own if they are known."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, OSError) and cause.errno and cause.strerror:
        return cause.strerror
    words = str(cause).strip()
    return words if _SAFE.fullmatch(words) else type(cause).__name__


def _find_bad_json(path: Path, text: str) -> set[str]:
    """Raise DataError at the first place that is not JSON, or no object; return all keys."""
    keys: set[str] = set()
    if path.suffix.lower() == ".json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                where = f"{path}, line {error.lineno}, column {error.colno}"
                raise DataError(f"{where} is not JSON: {_words(error)}") from None
        else:
            for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
                if not isinstance(row, dict):
                    kind = type(row).__name__
                    raise DataError(f"{path}, entry {number} is not a JSON object, got {kind}")
                keys.update(row)
            return keys
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not JSON: {_words(error)} at character {error.colno} "
                f"of {len(line)}"
            ) from None
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise DataError(f"{path}, line {number} is not a JSON object, got {kind}")
        keys.update(value)
    return keys


def _words(error: json.JSONDecodeError) -> str:
    # After a colon, or in quotes, it may show a character of the text.
    return re.split(r"[:'\"]", error.msg)[0].strip().removesuffix(" at")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep `datasets`' progress bars out of the run's log."""
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()


def shown_names(columns: list[str]) -> str:
    """List the columns; those that do not look like names are counted."""
    shown = [name for name in columns if NAME.fullmatch(name)]
    if odd := len(columns) - len(shown):
        shown.append(f"{odd} whose {'name' if odd == 1 else 'names'} may be data (not shown)")
    return ", ".join(shown)
