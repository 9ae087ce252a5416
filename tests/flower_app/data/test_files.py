"""Text in any usual encoding and compression is read; damaged text is refused with its line."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pyarrow
import pytest

from flower_app.data.files import read_lines, read_text
from flower_app.data.refusals import DataError
from flower_app.data.sources import load_rows
from tests.flower_app.data.helpers import files_config

TEXTS = ["größer", "世界 \u2028 one line \u0085 \x0b \x0c", "last"]
LINES = [f'{{"text": "{text}"}}' for text in (TEXTS[0], "世界 \u2028 one line \u0085", TEXTS[2])]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_with_a_mark_and_all_line_ends_are_read(
    tmp_path: Path, encoding: str, end: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join(LINES).encode(encoding))
    assert load_rows(files_config(path))["text"] == [
        "größer", "世界 \u2028 one line \u0085", "last"
    ]  # fmt: skip
    (tmp_path / "rows.csv").write_bytes(end.join(["text", "a", '"b ""c"""']).encode(encoding))
    assert load_rows(files_config(tmp_path / "rows.csv"))["text"] == ["a", 'b "c"']


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACKERS = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress}


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.JSON", "rows.csv", "rows.txt"])
def test_compressed_files_are_read(tmp_path: Path, ending: str, name: str) -> None:
    content = {"jsonl": '{"text": "ö"}\n', "JSON": '[{"text": "ö"}]', "csv": "text\nö\n"}
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(PACKERS[ending](content.get(name[5:], "ö").encode()))
    assert load_rows(files_config(tmp_path))["text"] == ["ö"]


@pytest.mark.parametrize("ending", PACKERS)
def test_a_compressed_file_by_another_name_is_known_by_how_it_begins(
    tmp_path: Path, ending: str
) -> None:
    path = tmp_path / "rows.ndjson"
    path.write_bytes(PACKERS[ending](b'{"text": "one"}\n{"text": "two"}\n'))
    assert load_rows(files_config(path))["text"] == ["one", "two"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_frames_that_follow_one_another_are_one_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(b"".join(PACKERS[ending](b'{"text": "%d"}\n' % i) for i in range(3)))
    assert load_rows(files_config(path))["text"] == ["0", "1", "2"]


@pytest.mark.parametrize("ending", PACKERS)
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows.jsonl{ending}"
    packed = PACKERS[ending](b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(4000)))
    for content in (packed[:-9], packed[: len(packed) // 2], b"no such file"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl\.\w+ cannot be decompressed as .*line"):
            load_rows(files_config(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\ntwo\ncaf\xe9\n", "is not UTF-8 text, in line 3"),
        (b"one\rtwo\r\ncaf\xe9\n", "is not UTF-8 text, in line 3"),
        (b"x" * 20_000 + b"\n\xff", "is not UTF-8 text, in line 2"),
        ("one\ntwo".encode("utf-16-le"), "line 1 holds a NUL character: if this is UTF-16"),
        (b"fine\nna\0ught\n", "line 2 holds a NUL character"),
        ("one\ntwo".encode("utf-16")[:-1], "is not UTF-16 text, in line 2"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is not UTF-8 text, in line 1"),
    ],
)
def test_what_is_no_text_is_refused_with_the_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt,? {words}"):
        read_text(path)


def test_line_ends_stay_where_they_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\rb\r\nc\nd")
    assert list(read_lines(tmp_path / "a.txt", newline="")) == ["a\r", "b\r\n", "c\n", "d"]
    assert list(read_lines(tmp_path / "a.txt")) == ["a\n", "b\n", "c\n", "d"]
