"""Where documents come from: the text that ships with Python, files, the hub.

A client's error travels to the server, and what a library says of bad data may quote it. So errors
are `DataError`s: they name paths, lines, columns, types and lengths, never what a cell holds.
"""

from __future__ import annotations

import csv
import difflib
import json
import pydoc_data.topics
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

from conf.schema import DataConfig

PASSAGE = 2000
"""Characters of a passage of running text, at least; long contexts get eight per token."""
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "txt"}

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
_NAME = re.compile(r"[^\W\d][\w.-]{0,31}")


class DataError(ValueError):
    """Data that cannot be used, in words that quote none of it."""


def load_rows(config: DataConfig, data_path: str = "") -> Dataset:
    """Load all documents, one per row.

    Parameters
    ----------
    config : DataConfig
        Names the source and its columns.
    data_path : str
        A node's own file or folder, read instead of the configured source.

    Returns
    -------
    Dataset
        With the configured columns only. Running text (built-in, txt) has `text` and `topic` or
        `file`, and one row per passage.

    Raises
    ------
    DataError
        If the source is missing, empty or unreadable, or lacks a configured column.
    """
    if data_path or config.source == "files":
        path = data_path or config.path
        if not path:
            raise DataError(
                "data.source=files needs a file: set data.path, or give each node its own with "
                '--node-config "data-path=..."'
            )
        rows, where = _load_files(Path(path).expanduser(), config), path
    elif config.source == "hub":
        rows, where = _load_hub(config), config.path
    else:
        rows, where = _load_builtin(config), "the built-in text"
    if len(rows) == 0:
        raise DataError(f"{where} holds no documents")
    return rows.select_columns(_columns(rows, config, where, partitioned=not data_path))


def _load_builtin(config: DataConfig) -> Dataset:
    topics = pydoc_data.topics.topics
    return _running_text({name: topics[name] for name in sorted(topics)}, "topic", config)


def _running_text(texts: dict[str, str], column: str, config: DataConfig) -> Dataset:
    size = max(PASSAGE, 8 * config.context)
    rows = [(passage, name) for name, text in texts.items() for passage in passages(text, size)]
    return Dataset.from_dict({"text": [row[0] for row in rows], column: [row[1] for row in rows]})


def passages(text: str, size: int) -> list[str]:
    """Cut running text at blank lines into passages of about `size` characters.

    A longer paragraph is cut at line ends, a longer line is left whole. Joined, the passages are
    the text, but for blank lines between them.
    """
    pieces = [piece for piece in text.replace("\r\n", "\n").split("\n\n") if piece.strip()]
    lines = [
        (line, glue)
        for piece in pieces
        for line, glue in (
            [(piece, "\n\n")] if len(piece) <= size else [(row, "\n") for row in piece.split("\n")]
        )
    ]
    found: list[str] = []
    for line, glue in lines:
        if found and len(found[-1]) + len(glue) + len(line) <= size:
            found[-1] += glue + line
        else:
            found.append(line)
    return found


def _load_files(path: Path, config: DataConfig) -> Dataset:
    if not path.exists():
        raise DataError(
            f"no data at {path.absolute()}: a relative path starts at the process's folder, which "
            "Flower chooses; give an absolute one"
        )
    files = [path]
    if path.is_dir():
        # Hidden files are editors' and systems' own: .ipynb_checkpoints, ._rows.csv.
        visible = (f for f in path.rglob("*") if "/." not in f"/{f.relative_to(path).as_posix()}")
        files = sorted(file for file in visible if file.is_file())
    found = {suffix: [f for f in files if f.suffix.lower() == suffix] for suffix in FORMATS}
    kinds = {FORMATS[suffix] for suffix, those in found.items() if those}
    if len(kinds) != 1:
        raise DataError(
            f"{path.absolute()} must hold files of one of the formats "
            f"{', '.join(FORMATS)}, got {', '.join(sorted(kinds)) or 'none of them'}"
        )
    kind, chosen = kinds.pop(), [f for those in found.values() for f in those]
    chosen = sorted(file for file in chosen if file.stat().st_size)
    if not chosen:
        raise DataError(f"{path.absolute()} is empty")
    if kind == "txt":
        root = path if path.is_dir() else path.parent
        texts = {str(file.relative_to(root)): _read_text(file) for file in chosen}
        return _running_text(texts, "file", config)
    return _load_tables(kind, chosen)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file} is not UTF-8 text, in line {line}") from None


def _load_tables(kind: str, files: list[Path]) -> Dataset:
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
        texts = [_read_text(file) for file in files] if kind != "parquet" else []
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
                        + (_separator(header) or "; quote commas within a field, close all quotes")
                    )
            line = reader.line_num + 1
    if double := sorted({name for name in header if name and header.count(name) > 1}):
        raise DataError(f"{path} has several columns of one name: {_names(double)}")
    return [name or f"Unnamed: {index}" for index, name in enumerate(header)]


def _separator(columns: list[str]) -> str:
    """Return a hint if the columns of a CSV seem to be separated by something else."""
    found = re.search(r"[;\t|]", columns[0]) if len(columns) == 1 else None
    return f"; is the separator {found[0]!r}? only commas are read" if found else ""


def _check_same_columns(files: list[Path], columns: Sequence[Collection[str]]) -> None:
    for path, names in zip(files, columns, strict=True):
        if differing := set(columns[0]) ^ set(names):
            raise DataError(
                f"{path} and {files[0]} must have the same columns, but only one has "
                f"{_names(sorted(differing))}"
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


def _load_hub(config: DataConfig) -> Dataset:
    try:
        with quiet():
            return datasets.load_dataset(config.path, config.name or None, split=config.split)
    except Exception as error:  # noqa: BLE001 - its text may quote data
        raise DataError(
            f"data set {config.path!r} (data.name={config.name!r}, data.split={config.split!r}) "
            f"cannot be loaded: {_hub_reason(error)}"
        ) from None


def _hub_reason(error: Exception) -> str:
    """Return why a data set is not there, in the library's words; of its content, only `reason`."""
    absent = (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DataFilesNotFoundError,
        ConnectionError,
    )
    unknown = ("Unknown split", "BuilderConfig", "Config name is missing")
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, absent) or (type(error) is ValueError and line.startswith(unknown)):
        return line
    return reason(error)


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


def _columns(rows: Dataset, config: DataConfig, where: str, *, partitioned: bool) -> list[str]:
    """Return the columns that the configuration names, or refuse one that is not there."""
    wanted = {}
    if config.messages_column:
        wanted["messages_column"] = config.messages_column
    elif config.prompt_column:
        wanted["prompt_column"] = config.prompt_column
        wanted["completion_column"] = config.completion_column
    else:
        wanted["text_column"] = config.text_column
    if partitioned and config.partitioner in ("natural", "dirichlet"):
        wanted["partition_by"] = config.partition_by or "topic"
    for key, column in wanted.items():
        if column not in rows.column_names:
            likely = [name for name in rows.column_names if _NAME.fullmatch(name)]
            near = difflib.get_close_matches(column, likely, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else _separator(rows.column_names)
            raise DataError(
                f"{where} has no column {column!r} (data.{key}); it has "
                f"{_names(rows.column_names)}{hint}"
            )
    return sorted(set(wanted.values()))


def _names(columns: list[str]) -> str:
    """List the columns; those that do not look like names are counted."""
    shown = [name for name in columns if _NAME.fullmatch(name)]
    if odd := len(columns) - len(shown):
        shown.append(f"{odd} whose {'name' if odd == 1 else 'names'} may be data (not shown)")
    return ", ".join(shown)
