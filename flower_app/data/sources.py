"""Where documents come from: the text that ships with Python, files, the hub.

A client's error travels to the server, and what a library says of bad data may quote it. So errors
are `DataError`s: they name paths, lines, columns, types and lengths, never what a cell holds.
"""

from __future__ import annotations

import difflib
import pydoc_data.topics
from pathlib import Path

import datasets
from datasets import Dataset

from conf.schema import DataConfig
from flower_app.data.tables import (
    NAME,
    DataError,
    load_tables,
    quiet,
    read_text,
    reason,
    separator,
    shown_names,
)

PASSAGE = 2000
"""Characters of a passage of running text, at least; long contexts get eight per token."""
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "txt"}


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
        texts = {str(file.relative_to(root)): read_text(file) for file in chosen}
        return _running_text(texts, "file", config)
    return load_tables(kind, chosen)


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
            likely = [name for name in rows.column_names if NAME.fullmatch(name)]
            near = difflib.get_close_matches(column, likely, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else separator(rows.column_names)
            raise DataError(
                f"{where} has no column {column!r} (data.{key}); it has "
                f"{shown_names(rows.column_names)}{hint}"
            )
    return sorted(set(wanted.values()))
