"""Where documents come from: the text that ships with Python, files, the hub.

A client's error travels to the server, and what a library says of bad data may quote it. So errors
are `DataError`s: they name paths, lines, columns, types and lengths, never what a cell holds.
"""

from __future__ import annotations

import logging
import pydoc_data.topics
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from conf.schema import DataConfig
from flower_app.data.files import read_text, suffix
from flower_app.data.formats import UNUSED, no_column, recognise, wanted
from flower_app.data.jsonl import read_json
from flower_app.data.refusals import DataError, quiet, reason, shown_names
from flower_app.data.rows import Rows
from flower_app.data.tables import (
    check_same_columns,
    is_saved,
    load_parquet,
    load_saved,
    read_csv,
)

logger = logging.getLogger(__name__)

PASSAGE = 2000
"""Characters of a passage of running text, at least; long contexts get eight per token."""
FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet",
    ".txt": "txt",
}  # fmt: skip
_ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What a data set's own folder says of its rows."""
_EXACT_JSON = re.compile(r"Value\('(string|large_string|null|bool|u?int\d+)'\)")
_EXACT_CSV = re.compile(r"Value\('(string|large_string)'\)")
_JSON_CONTENT = re.compile(r"'(content|value)': Json")
_GUESSED = re.compile(r"'(content|value)': (Json|Value\('(timestamp|date))|^Json")
_Reader = Callable[[Path, Collection[str]], Iterable[tuple[str, dict[str, Any], list[str]]]]


def load_rows(config: DataConfig, data_path: str = "") -> Rows:
    """Load all documents, one per row.

    Parameters
    ----------
    config : DataConfig
        Names the source, and its format or columns.
    data_path : str
        A node's own file or folder, read instead of the configured source.

    Returns
    -------
    Rows
        With the columns that are used only. Running text (built-in, txt) has `text` and `topic` or
        `file`, and one row per passage.

    Raises
    ------
    DataError
        If the source is missing, empty or unreadable, or its columns are not those of one format.
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
        found, where = _load_hub(config), config.path
        _check_guesses(found, config, where, found.builder_name or "")
        rows = _of_dataset(found)
    else:
        rows, where = _load_builtin(config), "the built-in text"
    if len(rows) == 0:
        raise DataError(f"{where} holds no documents")
    return rows.select_columns(_columns(rows, config, where, partitioned=not data_path))


def _load_builtin(config: DataConfig) -> Rows:
    topics = pydoc_data.topics.topics
    return _running_text({name: topics[name] for name in sorted(topics)}, "topic", config)


def _running_text(texts: dict[str, str], column: str, config: DataConfig) -> Rows:
    size = max(PASSAGE, 8 * config.context)
    found = [
        (f"{name}, passage {number}", {"text": passage, column: name})
        for name, text in texts.items()
        for number, passage in enumerate(passages(text, size), start=1)
    ]
    return _listed(found, ["text", column])


def _listed(found: list[tuple[str, dict[str, Any]]], columns: Collection[str]) -> Rows:
    return Rows([row for _, row in found], list(columns), lambda index: found[index][0])


def _of_dataset(rows: Dataset, columns: Collection[str] = ()) -> Rows:
    return Rows(rows, list(columns or rows.column_names), lambda index: f"row {index + 1}")


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


def _load_files(path: Path, config: DataConfig) -> Rows:
    if not path.exists():
        raise DataError(
            f"no data at {path.absolute()}: a relative path starts at the process's folder, which "
            "Flower chooses; give an absolute one"
        )
    if path.is_dir() and is_saved(path):
        saved = load_saved(path, config.split)
        _check_guesses(saved, config, str(path))
        return _of_dataset(saved)
    kind, files = _find_files(path)
    if kind == "txt":
        root = path if path.is_dir() else path.parent
        texts = {str(file.relative_to(root)): read_text(file) for file in files}
        return _running_text(texts, "file", config)
    if kind == "parquet":
        rows, names = load_parquet(files, wanted(config))
        _check_guesses(rows, config, str(path), columns=names)
        return _of_dataset(rows, names)
    return _read_files(kind, files, config)


def _find_files(path: Path) -> tuple[str, list[Path]]:
    """Return the files of the one format that is there, and the format."""
    files = [path]
    if path.is_dir():
        # Hidden files are editors' and systems' own: .ipynb_checkpoints, ._rows.csv.
        visible = (f for f in path.rglob("*") if "/." not in f"/{f.relative_to(path).as_posix()}")
        files = sorted(file for file in visible if file.is_file() and file.name not in _ABOUT)
    kinds = {FORMATS[suffix(file)] for file in files if suffix(file) in FORMATS}
    if len(kinds) != 1:
        arrow = any(file.suffix == ".arrow" for file in files)
        raise DataError(
            f"{path.absolute()} must hold files of one of the formats "
            f"{', '.join(FORMATS)}, got {', '.join(sorted(kinds)) or 'none of them'}"
            + (
                "; give the folder that save_to_disk wrote, not one around it or in it"
                if arrow
                else ""
            )
        )
    chosen = sorted(file for file in files if suffix(file) in FORMATS and file.stat().st_size)
    if not chosen:
        raise DataError(f"{path.absolute()} is empty")
    return kinds.pop(), chosen


def _read_files(kind: str, files: list[Path], config: DataConfig) -> Rows:
    reader: _Reader = read_json if kind == "json" else read_csv
    found: list[tuple[str, dict[str, Any]]] = []
    names: dict[Path, dict[str, None]] = {}
    """The columns of each file, in their order; its rows need not have all of them."""
    for file in files:
        for place, row, columns in reader(file, wanted(config)):
            found.append((place, row))
            names.setdefault(file, {}).update(dict.fromkeys(columns))
    check_same_columns(list(names), list(names.values()))
    return _listed(found, next(iter(names.values()), ()))


def _load_hub(config: DataConfig) -> Dataset:
    if is_saved(Path(config.path).expanduser()):
        return load_saved(Path(config.path).expanduser(), config.split)
    try:
        with quiet():
            return datasets.load_dataset(config.path, config.name or None, split=config.split)
    except Exception as error:
        logger.warning("%s cannot be loaded", config.path, exc_info=True)
        raise DataError(
            f"data set {config.path!r} (data.name={config.name!r}, data.split={config.split!r}) "
            f"cannot be loaded: {_hub_reason(error)}"
        ) from None


def _check_guesses(
    rows: Dataset, config: DataConfig, where: str, builder: str = "", columns: Sequence[str] = ()
) -> None:
    """Refuse texts that `datasets` made something else of: JSON, and what it guesses of files."""
    layout = recognise(config, columns or rows.column_names, where)
    exact = {"json": _EXACT_JSON, "csv": _EXACT_CSV}.get(builder)
    for column in layout.columns.values():
        kind = str(rows.features[column])
        if layout.kind == "messages":
            guessed = bool((_GUESSED if exact else _JSON_CONTENT).search(kind))
        else:
            guessed = not exact.fullmatch(kind) if exact else kind.startswith("Json")
        if guessed:
            raise DataError(
                f"{where}: `datasets` guesses what the texts of column {column!r} are, and may "
                "have changed them: give the files that they come from, with data.source=files"
            )


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


def _columns(rows: Rows, config: DataConfig, where: str, *, partitioned: bool) -> list[str]:
    """Return the columns that are used, or refuse what is not there."""
    there = rows.column_names
    layout = recognise(config, there, where)
    used = {*layout.columns.values(), *(set(there) & set(layout.optional))}
    if partitioned and config.partitioner in ("natural", "dirichlet"):
        by = config.partition_by or "topic"
        if by not in there:
            raise no_column("data.partition_by", by, there, where)
        used.add(by)
    if layout.kind in ("messages", "alpaca") and (odd := sorted(set(there) & set(UNUSED) - used)):
        logger.warning("%s: not used, and not learned: column %s", where, shown_names(odd))
    return sorted(used)
