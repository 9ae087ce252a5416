"""data.format, or the columns, say what a row is; what could be several is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flower_app.data.client import load_client_data
from flower_app.data.examples import IGNORED
from flower_app.data.refusals import DataError
from flower_app.data.sources import load_rows
from tests.flower_app.data.helpers import CHAT, byte_tokenizer, files_config, write_jsonl

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
ROWS = {
    "text": {"text": "hi yo"},
    "prompt": {"prompt": "hi", "completion": " yo"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SHAREGPT},
    "alpaca": {"instruction": "Add.", "input": "1+1", "output": "2"},
}
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add.\n\n### Input:\n1+1\n\n### Response:\n"
)
WHOLE = {
    "text": ("hi yo", "hi yo"),
    "prompt": ("hi yo", " yo"),
    "messages": ("<user>hi\n<assistant>yo\n", "yo\n"),
    "sharegpt": ("<user>hi\n<assistant>yo\n", "yo\n"),
    "alpaca": (ALPACA + "2", "2"),
}


def read(path: Path, **values: Any) -> tuple[str, str]:
    """The text of the first example, and what is learned of it."""
    tokenizer = byte_tokenizer(CHAT)
    config = files_config(path, context=1000, heldout=0.0, **values)
    one = load_client_data(config, tokenizer, partition=0, partitions=1, seed=0).train[0]
    learned = one.labels[one.labels != IGNORED]
    return (
        tokenizer.decode(one.input_ids, skip_special_tokens=True),
        tokenizer.decode(learned, skip_special_tokens=True),
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_known_by_its_columns_or_named(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{**ROWS[name], "id": 7}] * 2)
    assert read(path) == WHOLE[name]
    assert read(path, format=name) == WHOLE[name]
    assert read(path, partitioner="natural", partition_by="id") == WHOLE[name]


def test_alpaca_without_input_has_the_shorter_prompt(tmp_path: Path) -> None:
    short = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nGreet {name}.\n\n### Response:\n"
    )
    row = {"instruction": "Greet {name}.", "output": "Hi!"}
    for more in ({}, {"input": ""}, {"input": None}):
        path = write_jsonl(tmp_path / "d.jsonl", [{**row, **more}])
        assert read(path) == (short + "Hi!", "Hi!")


def test_what_could_be_several_formats_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{**ROWS["alpaca"], "text": "x"}])
    words = (
        "could be read as text or as alpaca: set data.format .* it has instruction, input, output"
    )
    with pytest.raises(DataError, match=words):
        load_rows(files_config(path))
    assert read(path, format="text") == ("x", "x")
    assert read(path, format="alpaca") == WHOLE["alpaca"]
    assert read(path, text_column="output") == ("2", "2")


def test_columns_of_no_format_are_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"instruction": "x", "answer": "y"}])
    with pytest.raises(
        DataError,
        match=r"is none of prompt, messages, sharegpt, alpaca \(data\.format\), and has no column "
        r"'text' \(data\.text_column\); it has instruction, answer",
    ):
        load_rows(files_config(path))
    for name, words in (
        ("alpaca", r"no column 'output' \(data\.format=alpaca\); it has instruction, answer"),
        ("sharegpt", r"no column 'conversations' \(data\.messages_column\)"),
        ("prompt", r"no column 'prompt' \(data\.prompt_column\)"),
    ):
        with pytest.raises(DataError, match=words):
            load_rows(files_config(path, format=name))


def test_sharegpt_may_stand_in_any_column_and_name_its_tools(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "s"}, {"from": "human", "value": "a"},
        {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "one", "weight": None},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "d.jsonl", [{"talk": turns}])
    whole = "<system>s\n<user>a\n<assistant>f()\n<tool>1\n<assistant>one\n"
    for values in ({}, {"format": "sharegpt"}):
        assert read(path, messages_column="talk", **values) == (whole, "f()\none\n")
    path = write_jsonl(tmp_path / "d.jsonl", [{"conversations": TURNS}])
    assert read(path) == WHOLE["messages"]


def test_an_unknown_speaker_is_refused_without_its_name(tmp_path: Path) -> None:
    turns = [{"from": "Mr Secret", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = write_jsonl(tmp_path / "d.jsonl", [{"conversations": turns}])
    with pytest.raises(DataError, match=r"line 1\): who speaks in message 1 of 2 is not") as caught:
        read(path)
    assert "Secret" not in str(caught.value)


def test_a_list_in_a_prompt_column_is_told_its_format(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": TURNS[:1], "completion": TURNS[1:]}])
    with pytest.raises(DataError, match="'prompt' must hold text, got list; for conversations"):
        read(path)
