"""CSV by the book, parquet without Arrow's inventions, and folders of save_to_disk."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Json, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import DataConfig
from flower_app.data.refusals import DataError
from flower_app.data.sources import load_rows
from tests.flower_app.data.helpers import files_config, write_jsonl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


cells = st.text(alphabet='ab ",;\\\n\r\u2028é\t', max_size=8)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.tuples(cells, cells), min_size=1, max_size=5))
def test_what_the_csv_module_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "y"), *texts])
    rows = load_rows(files_config(path, prompt_column="text", completion_column="y"))
    assert [(row["text"], row["y"]) for row in rows] == texts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('text,y\n"He said \\"hi\\" now",1\n', "line 2 has a quote inside .*backslash"),
        ('text,y\nfine,1\nHe said \\"hi\\",1\n', "line 3 has a quote inside .*backslash"),
        ('text,y\n"a \\", b",1\n"c",2\n', "line 2 .*backslash"),
        ('text,y\n"x\ny",1\n5" pipe,1\n', "line 4 has a quote inside a field"),
        ('text,y\na, "b"\n', "line 2 has a quote inside a field"),
        ('text,y\n"a"b,1\n', "line 2 has a quote inside a field"),
        ('text,y\na,1\nx,"open\nmore,2\n', "line 3: EOF inside string"),
        ("text\ty\na\tb\n", "separator '\\\\t'"),
        ("text,y\na\n", "line 2 has 1 field, the header 2"),
        ("text,y\na,b\0\n", "line 2 holds a NUL"),
    ],
)
def test_another_dialect_is_named_with_its_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.csv.* {words}"):
        load_rows(files_config(tmp_path / "a.csv"))


def test_a_backslash_within_a_text_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"print(\\""a\\"")"\nC:\\dir\\\n', encoding="utf-8")
    assert load_rows(files_config(tmp_path / "a.csv"))["text"] == ['print(\\"a\\")', "C:\\dir\\"]


def talk(name: str, **arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": properties}}


def test_nulls_that_arrow_invented_are_dropped_at_every_depth(tmp_path: Path) -> None:
    rows = [
        {"messages": talk("weather", city="Paris"), "tools": [tool("f", a={"type": "int"})]},
        {
            "messages": talk("sum", of={"deep": [{"x": 1}, {"y": 2.5}]}),
            "tools": [tool("g", b={"z": 1})],
        },
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "d.parquet", tmp_path / "saved"):
        assert load_rows(files_config(path)).to_list() == rows


def test_each_parquet_file_may_have_nulls_and_keys_of_its_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": talk("a", x=1), "text": None},
        {"messages": talk("b", city="Paris"), "text": "2024-01-01"},
    ]
    for number, row in enumerate(rows):
        Dataset.from_list([row]).to_parquet(tmp_path / f"{number}.parquet")
    assert load_rows(files_config(tmp_path, format="messages")).to_list() == [
        {"messages": row["messages"]} for row in rows
    ]
    assert load_rows(files_config(tmp_path, format="text"))["text"] == [None, "2024-01-01"]


def test_nulls_within_json_are_as_written(tmp_path: Path) -> None:
    rows = [{"messages": talk("f", city="Paris", country=None)}]
    call = {"type": Value("string"), "function": Json()}
    turn = {"role": Value("string"), "content": Value("string"), "tool_calls": List(call)}
    saved = Dataset.from_list(rows, features=Features({"messages": List(turn)}))
    saved.to_parquet(tmp_path / "d.parquet")
    assert load_rows(files_config(tmp_path)).to_list() == rows


@pytest.mark.parametrize("name", ["d.parquet", "saved"])
def test_texts_that_were_stored_as_json_are_refused(tmp_path: Path, name: str) -> None:
    """ "007" and 7 are the same there: `datasets` returns 7 for both."""
    found = Dataset.from_list([{"text": "007"}], features=Features({"text": Json()}))
    if name == "saved":
        found.save_to_disk(tmp_path / name)
    else:
        found.to_parquet(tmp_path / name)
    with pytest.raises(DataError, match="may have changed them"):
        load_rows(files_config(tmp_path / name))


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["007", "null", None], "n": [1, 2, 3]}).to_parquet(
        tmp_path / "d.parquet"
    )
    config = files_config(tmp_path, partitioner="natural", partition_by="n")
    rows = load_rows(config)
    assert rows.to_list()[0] == {"n": 1, "text": "007"}
    assert rows["text"] == ["007", "null", None]
    assert rows.place(1) == "row 2"


@pytest.mark.parametrize("source", ["files", "hub"])
def test_folders_of_save_to_disk_are_read(tmp_path: Path, source: str) -> None:
    one, other = (Dataset.from_dict({"text": [text]}) for text in "ab")
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, test=other).save_to_disk(tmp_path / "both")
    for name, split, text in (("one", "train", "a"), ("both", "train", "a"), ("both", "test", "b")):
        config = DataConfig(source=source, path=str(tmp_path / name), split=split)
        assert load_rows(config)["text"] == [text]
    with pytest.raises(DataError, match=r"no split 'dev' \(data\.split\); it has test, train"):
        load_rows(DataConfig(source=source, path=str(tmp_path / "both"), split="dev"))


def test_a_broken_folder_of_save_to_disk_is_named_as_what_it_is(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="a folder of save_to_disk, cannot be read"):
        load_rows(files_config(tmp_path / "saved"))
    with pytest.raises(DataError, match="none of them; give the folder that save_to_disk wrote"):
        load_rows(files_config(tmp_path))


def test_what_describes_a_data_set_is_not_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": "a"}])
    (tmp_path / "dataset_infos.json").write_text('{"default": {"description": "x"}}')
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert load_rows(files_config(tmp_path))["text"] == ["a"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", '{"text": "007"}\n{"text": 7}\n'),
        ("train.jsonl", '{"text": "2024-01-02"}\n'),
        ("train.jsonl", '{"text": 2}\n{"text": 2.5}\n'),
        ("train.csv", "text\n007\nNA\n"),
        ("train.jsonl", '{"messages": [{"role": "user", "content": "007"}]}\n'
                        '{"messages": [{"role": "user", "content": ["x"]}]}\n'),
    ],
)  # fmt: skip
def test_texts_that_datasets_changed_are_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=r"guesses what the texts .* data\.source=files"):
        load_rows(DataConfig(source="hub", path=str(tmp_path)))
    assert load_rows(files_config(tmp_path / name))


def test_texts_that_datasets_leaves_alone_are_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "007"}, {"text": None}, {"text": "null"}])
    assert load_rows(DataConfig(source="hub", path=str(tmp_path)))["text"] == ["007", None, "null"]
