"""Text files, line by line: decompressed, decoded, or refused with the line."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow

from flower_app.data.refusals import DataError, reason

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_BEGINNINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # Before UTF-16, whose mark this one begins with.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def suffix(path: Path) -> str:
    """Return what a file's name ends with, below that of its compression."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def read_text(path: Path) -> str:
    return "".join(read_lines(path))


def read_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Yield the lines of a text file; they end at CR, LF or both, never at U+2028.

    Parameters
    ----------
    path : Path
        UTF-8, or UTF-16 or UTF-32 with its mark; .gz, .zst and .bz2 are decompressed.
    newline : str | None
        As `open` takes it: None makes every line end in one newline, "" keeps it as it is.

    Raises
    ------
    DataError
        If it is not such text, with the line.
    """
    number = 0
    try:
        with _open_bytes(path) as head:
            encoding = _encoding(head.read(4))
        with io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline=newline) as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise DataError(
                        f"{path}, line {number} holds a NUL character: if this is UTF-16 without "
                        "a mark, save it as UTF-8"
                    )
                yield line
    except UnicodeError:
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{path} is not {name} text, in {_bad_line(path, encoding)}") from None
    except OSError as error:
        kind = _compression(path)
        if not kind or error.errno:
            raise
        raise DataError(
            f"{path} cannot be decompressed as {kind} after line {number}: is it whole? "
            f"({reason(error)})"
        ) from None


def _compression(path: Path) -> str | None:
    """Return how a file says it is compressed: by its name, or else by how it begins."""
    with path.open("rb") as file:
        head = file.read(4)
    begins = (kind for start, kind in _BEGINNINGS.items() if head.startswith(start))
    return COMPRESSED.get(path.suffix.lower()) or next(begins, None)


def _open_bytes(path: Path) -> Any:
    kind = _compression(path)
    if not kind:
        return path.open("rb")
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), kind))


def _encoding(head: bytes) -> str:
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def _bad_line(path: Path, encoding: str) -> str:
    """Return where decoding fails: the file was read ahead of its lines, so it is read again."""
    with _open_bytes(path) as file:
        content = file.read()
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        before = content[: error.start].decode(encoding, "replace")
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        return f"line {newlines.decode(before, final=True).count(chr(10)) + 1}"
    return "its last line"
