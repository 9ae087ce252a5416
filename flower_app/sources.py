"""Where documents come from: the text that ships with Python, files, the hub."""

from __future__ import annotations

import csv
import difflib
import json
import pydoc_data.topics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

from conf.schema import DataConfig

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
    ValueError
        If the source is missing, empty or unreadable, or lacks a configured column.
    """
    if data_path or config.source == "files":
        path = data_path or config.path
        if not path:
            raise ValueError(
                "data.source=files needs a file: set data.path, or give each node its own with "
                '--node-config "data-path=..."'
            )
        rows, where = _load_files(Path(path).expanduser(), config), path
    elif config.source == "hub":
        rows, where = _load_hub(config), config.path
    else:
        rows, where = _load_builtin(config), "the built-in text"
    if len(rows) == 0:
        raise ValueError(f"{where} holds no documents")
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
        raise ValueError(
            f"no data at {path.absolute()}: a relative path starts at the process's folder, which "
            "Flower chooses; give an absolute one"
        )
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = {suffix: [f for f in files if f.suffix.lower() == suffix] for suffix in FORMATS}
    kinds = {FORMATS[suffix] for suffix, those in found.items() if those}
    if len(kinds) != 1:
        raise ValueError(
            f"{path.absolute()} must hold files of one of the formats "
            f"{', '.join(FORMATS)}, got {', '.join(sorted(kinds)) or 'none of them'}"
        )
    kind, chosen = kinds.pop(), [f for those in found.values() for f in those]
    chosen = sorted(file for file in chosen if file.stat().st_size)
    if not chosen:
        raise ValueError(f"{path.absolute()} is empty")
    if kind == "txt":
        root = path if path.is_dir() else path.parent
        texts = {str(file.relative_to(root)): _read_text(file) for file in chosen}
        return _running_text(texts, "file", config)
    return _load_tables(kind, chosen)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _load_tables(kind: str, files: list[Path]) -> Dataset:
    options: dict[str, Any] = {}
    if kind == "csv":
        # As text: pandas would turn 007 into 7 and the word NA into nothing.
        with files[0].open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file))
        options = {"features": Features({name: Value("string") for name in header}),
                   "keep_default_na": False}  # fmt: skip
    try:
        with quiet():
            return datasets.load_dataset(
                kind, data_files=[str(file) for file in files], split="train", **options
            )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        if kind == "json":
            for path in files:
                _find_bad_line(path)
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(
            f"{', '.join(map(str, files))} cannot be read as {kind}: {cause}"
        ) from error


def _find_bad_line(path: Path) -> None:
    """Raise ValueError at the first line of a jsonl file that is no JSON object."""
    if path.suffix.lower() != ".jsonl":
        return
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON: {error.msg}: {line[:60]!r}"
            ) from None
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: {line[:60]!r}")


def _load_hub(config: DataConfig) -> Dataset:
    try:
        with quiet():
            return datasets.load_dataset(config.path, config.name or None, split=config.split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"data set {config.path!r} (data.name={config.name!r}, data.split={config.split!r}) "
            f"cannot be loaded: {reason}"
        ) from error


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
            near = difflib.get_close_matches(column, rows.column_names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{where} has no column {column!r} (data.{key}); it has "
                f"{', '.join(rows.column_names)}{hint}"
            )
    return sorted(set(wanted.values()))
