"""Documents as they were read, one a row, and where each of them stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset, Json, List


class Rows:
    """Rows of a list, or of a `Dataset` that lies on disk; nothing in them is converted.

    Parameters
    ----------
    source : sequence of dict, or Dataset
        Arrow gives every object the keys of all objects of its column, with nulls; of a Dataset's
        rows these are dropped, at every depth.
    columns : sequence of str
        The names of the columns; a row that lacks one has None there.
    place : callable
        Says in words where the row of a number stands: "line 3 of /data/rows.jsonl".
    indices : sequence of int, optional
        The rows of `source` that count, in this order; all of them by default.
    """

    def __init__(
        self,
        source: Sequence[dict[str, Any]] | Dataset,
        columns: Sequence[str],
        place: Callable[[int], str],
        indices: Sequence[int] | None = None,
    ) -> None:
        self._source, self._place = source, place
        self._indices = range(len(source)) if indices is None else indices
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: int | str) -> Any:
        """Return a row as a dict, or a column as a list."""
        if isinstance(key, str):
            return [row[key] for row in self.select_columns([key])]
        row = self._source[int(self._indices[key])]
        if isinstance(self._source, Dataset):
            kinds = self._source.features
            row = {name: without_nulls(row[name], kinds[name]) for name in self.column_names}
        return {name: row.get(name) for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def place(self, index: int) -> str:
        """Return where a row stands in what was read."""
        return self._place(int(self._indices[index]))

    def select(self, indices: Sequence[int]) -> Rows:
        """Return these rows."""
        chosen = [self._indices[index] for index in indices]
        return Rows(self._source, self.column_names, self._place, chosen)

    def select_columns(self, names: Sequence[str]) -> Rows:
        """Return the rows with these columns only."""
        source = self._source
        if isinstance(source, Dataset):
            source = source.select_columns(list(names))
        return Rows(source, names, self._place, self._indices)

    def to_list(self) -> list[dict[str, Any]]:
        return list(self)


def without_nulls(value: Any, kind: Any = None) -> Any:
    """Return the value without the keys of objects that hold nothing; JSON is as written."""
    if isinstance(kind, Json):
        return value
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if inner is not None}
        kinds = kind if isinstance(kind, dict) else {}
        return {key: without_nulls(inner, kinds.get(key)) for key, inner in kept.items()}
    inside = kind.feature if isinstance(kind, List) else None
    return [without_nulls(inner, inside) for inner in value] if isinstance(value, list) else value
