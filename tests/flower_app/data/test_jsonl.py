"""JSON is what the file says: nothing inferred, nothing rounded, wrong lines named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flower_app.data.refusals import DataError
from flower_app.data.sources import load_rows
from flower_app.data.text import _text
from tests.flower_app.data.helpers import files_config, write_jsonl

VALUES = [
    "007", "true", "null", "NaN", "1e5", '"quoted"', '{"a": 1}', "2024-01-02",
    "2024-01-02T03:04:05Z",
    "", " ", "plain", 7, 2, 2.5, 3.141592653589793, 0.1, 12345678901234567890123, -1,
]  # fmt: skip


def put(path: Path, values: list[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps([{"text": value} for value in values], indent=1), "utf-8")
        return path
    return write_jsonl(path, ({"text": value} for value in values))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_text_is_what_the_file_says(tmp_path: Path, name: str) -> None:
    rows = load_rows(files_config(put(tmp_path / name, VALUES)))
    assert [_text(row, "text") for row in rows] == [str(value) for value in VALUES]
    assert rows["text"] == VALUES


def test_numbers_are_written_as_they_are(tmp_path: Path) -> None:
    written = ["2.50", "1e5", "1E5", "1e400", "-0.0", "0.1000000000000000055", "true", "1.0"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": {value}}}\n' for value in written), "utf-8")
    assert [_text(row, "text") for row in load_rows(files_config(path))] == written


def test_nothing_in_a_conversation_is_converted(tmp_path: Path) -> None:
    def call(**arguments: Any) -> list[dict[str, Any]]:
        function = {"name": "f", "arguments": arguments}
        return [{"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]

    talks = [
        call(city="Paris"), call(day="2024-01-02", at=None), call(n=2), call(n=2.5), call(),
        [{"role": "user", "content": [{"type": "text", "text": "null"}]}],
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "d.jsonl", ({"messages": talk} for talk in talks))
    assert load_rows(files_config(path))["messages"] == talks


def test_columns_that_nobody_uses_may_be_anything(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    others = ("null", "1", '"x"', "[1]", '{"a": [{}]}', "NaN", '"\\ud800"')
    lines = [f'{{"text": "{i}", "note": {other}}}\n' for i, other in enumerate(others)]
    path.write_text("".join(lines) + '{"text": "last"}\n', "utf-8")
    rows = load_rows(files_config(path))
    assert rows.to_list() == [{"text": str(i)} for i in range(7)] + [{"text": "last"}]
    assert rows.place(3) == f"{path}, line 4"


@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_a_json_file_may_hold_an_array_an_object_or_lines(tmp_path: Path, end: str) -> None:
    path = tmp_path / "d.json"
    for content in ('[{"text": "a"},\n {"text": "b"}]', '{"text": "a"}\n\n{"text": "b"}'):
        path.write_text(content + end, "utf-8")
        assert load_rows(files_config(path))["text"] == ["a", "b"]
    path.write_text('{\n "text": "a"\n}' + end, "utf-8")
    assert load_rows(files_config(path))["text"] == ["a"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "x", "text": "y"}', "the key 'text' stands twice in one object"),
        ('{"text": "x", "n": {"a": 1, "b": 2, "a": 3}}', "the key 'a' stands twice"),
        ('{"text": "x", "My Name": 1, "My Name": 2}', r"the key \(not shown\) stands twice"),
        ('{"text": NaN}', "holds NaN or Infinity"),
        ('{"text": -Infinity}', "holds NaN or Infinity"),
        ('{"text": "\\ud83d"}', "holds half a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "too long a number"),
        ("[]", "is not a JSON object, got list"),
        ("null", "is not a JSON object, got NoneType"),
        ("{'text': 'x'}", "is not JSON: Expecting property name"),
        ('{"text": "a\tb"}', "is not JSON: Invalid control character"),
        ('{"text": "x"},', "is not JSON: Extra data"),
        ('{"text": "x"', "is not JSON: Expecting"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + '\n{"text": "y"}\n', "utf-8")
    with pytest.raises(DataError, match=rf"d\.jsonl, line 3 .*{words}"):
        load_rows(files_config(path))


def test_an_array_named_jsonl_is_told_its_name(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('[\n{"text": "x"}\n]\n', "utf-8")
    with pytest.raises(DataError, match=r"line 1 is not JSON.* name it d\.json$"):
        load_rows(files_config(path))
