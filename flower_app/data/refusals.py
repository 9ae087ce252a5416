"""What may be said of bad data: a client's error travels to the server and quotes none of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import datasets

# Library messages that may be passed on: as a whole, they leave no room for content.
_SAFE = re.compile(
    r"Truncated compressed stream"
    r'|Instruction "train" corresponds to no data!'
    r"|Parquet magic bytes not found in footer\. Either the file is corrupted or this is not a "
    r"parquet file\."
)
# A CSV without a header has its first row for names, so only what looks like a name is shown.
NAME = re.compile(r"[^\W\d][\w.-]{0,31}")


class DataError(ValueError):
    """Data that cannot be used, in words that quote none of it."""


def reason(error: Exception) -> str:
    """Return why a library failed, in words that cannot hold data: its own if they are known."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(cause, OSError) and cause.errno and cause.strerror:
        return cause.strerror
    words = str(cause).strip()
    return words if _SAFE.fullmatch(words) else type(cause).__name__


def shown_names(columns: list[str]) -> str:
    """List the columns; those that do not look like names are counted."""
    shown = [name for name in columns if NAME.fullmatch(name)]
    if odd := len(columns) - len(shown):
        shown.append(f"{odd} whose {'name' if odd == 1 else 'names'} may be data (not shown)")
    return ", ".join(shown)


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
