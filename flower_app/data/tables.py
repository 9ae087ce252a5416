"""Tables: CSV read strictly, as text; parquet and saved folders by `datasets`, with their types."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow.parquet
from datasets import Dataset, Features

from flower_app.data.files import read_lines
from flower_app.data.refusals import DataError, quiet, reason, shown_names

logger = logging.getLogger(__name__)

_FIELD = r'(?:"(?:[^"]++|"")*+"|[^",\r\n]*+)'
_RECORD = re.compile(rf"{_FIELD}(?:,{_FIELD})*+\s*")
"""A record whose quotes surround whole fields and are doubled within them."""
_OPEN = re.compile(rf'(?:{_FIELD},)*+"(?:[^"]++|"")*+')


def read_csv(
    path: Path, wanted: Collection[str]
) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Yield every row of a CSV: its place, its wanted cells as written, the names of its columns.

    Raises
    ------
    DataError
        If columns would shift or quotes would get into a text: if a row has more or fewer fields
        than the header, a name stands twice, or quotes are not those of RFC 4180.
    """
    header: list[str] = []
    for line, row, raw in _records(path):
        place = f"{path}, line {line}"
        if not header:
            header = _header(path, row)
            _check_quotes(raw, place)
            continue
        if len(row) != len(header):
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            raise DataError(
                f"{place} has {fields}, the header {len(header)}"
                + (separator(header) or "; quote commas within a field, close all quotes")
                + _backslash(raw)
            )
        _check_quotes(raw, place)
        cells = dict(zip(header, row, strict=True))
        yield place, {name: cells[name] for name in wanted if name in cells}, header


def _records(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """Yield the number of its first line, the fields, and the text of every record."""
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131072 characters of csv
    seen: list[str] = []

    def lines() -> Iterator[str]:
        for line in read_lines(path, newline=""):
            seen.append(line)
            yield line

    reader, first = csv.reader(lines()), 1
    for row in reader:
        if len(row) > 1 or "".join(row).strip():
            yield first, row, "".join(seen)
        seen.clear()
        first = reader.line_num + 1


def _header(path: Path, row: list[str]) -> list[str]:
    if double := sorted({name for name in row if name and row.count(name) > 1}):
        raise DataError(f"{path} has several columns of one name: {shown_names(double)}")
    return [name or f"Unnamed: {index}" for index, name in enumerate(row)]


def _check_quotes(raw: str, place: str) -> None:
    if '"' not in raw or _RECORD.fullmatch(raw):
        return
    if _OPEN.fullmatch(raw):
        raise DataError(f"{place}: EOF inside string: a quote is not closed{_backslash(raw)}")
    raise DataError(
        f"{place} has a quote inside a field: put the whole field in quotes and double those "
        f"within{_backslash(raw)}"
    )


def _backslash(raw: str) -> str:
    if '\\"' not in raw:
        return ""
    return ' (a backslash does not escape a quote here: write "" for \\")'


def separator(columns: list[str]) -> str:
    """Return a hint if the columns of a CSV seem to be separated by something else."""
    found = re.search(r"[;\t|]", columns[0]) if len(columns) == 1 else None
    return f"; is the separator {found[0]!r}? only commas are read" if found else ""


def check_same_columns(files: Sequence[Path], columns: Sequence[Collection[str]]) -> None:
    for path, names in zip(files, columns, strict=True):
        if differing := set(columns[0]) ^ set(names):
            raise DataError(
                f"{path} and {files[0]} must have the same columns, but only one has "
                f"{shown_names(sorted(differing))}"
            )


def load_parquet(files: Sequence[Path], wanted: Collection[str]) -> tuple[Dataset, list[str]]:
    """Return the wanted columns of parquet files, and the names of all."""
    names = ", ".join(map(str, files))
    try:
        schemas = [pyarrow.parquet.read_schema(file) for file in files]
        found = [schema.names for schema in schemas]
        check_same_columns(files, [set(each) & set(wanted) for each in found])
        columns = [name for name in found[0] if name in wanted] or found[0][:1]
        with quiet():
            rows = datasets.load_dataset(
                "parquet",
                data_files=[str(file) for file in files],
                split="train",
                columns=columns,
                features=_features_of_all(schemas, columns),
            )
    except DataError:
        raise
    except Exception as error:
        logger.warning("%s cannot be read", names, exc_info=True)
        why = reason(error)
        if why.startswith('Instruction "train"'):
            raise DataError(f"{names} holds no documents") from None
        hint = "; do they have the same types?" if len(files) > 1 else ""
        raise DataError(f"{names} cannot be read as parquet: {why}{hint}") from None
    return rows, found[0]


def _features_of_all(schemas: Sequence[pyarrow.Schema], columns: Sequence[str]) -> Features | None:
    """Return types that hold the rows of all files, if they differ: each knows only its own nulls
    and the keys of its own objects."""
    own = [pyarrow.schema([schema.field(name) for name in columns]) for schema in schemas]
    if all(schema.equals(own[0]) for schema in own):
        return None
    try:
        return Features.from_arrow_schema(pyarrow.unify_schemas(own, promote_options="permissive"))
    except pyarrow.ArrowException:
        return None  # some of these can be cast all the same


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_saved(path: Path, split: str) -> Dataset:
    """Return what `save_to_disk` wrote; of several splits, the one that data.split names."""
    try:
        with quiet():
            found = datasets.load_from_disk(str(path))
    except Exception as error:
        logger.warning("%s cannot be read", path, exc_info=True)
        raise DataError(
            f"{path.absolute()}, a folder of save_to_disk, cannot be read: {reason(error)}"
        ) from None
    if isinstance(found, Dataset):
        return found
    if split not in found:
        raise DataError(
            f"{path.absolute()}, a folder of save_to_disk, has no split {split!r} (data.split); it "
            f"has {shown_names(sorted(found))}"
        )
    return found[split]
