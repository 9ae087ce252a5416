"""Every format is read, wrong files are refused in words, and partitions are a partition."""

from __future__ import annotations

import csv
import json
import pydoc_data.topics
from collections import Counter
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from conf.schema import DataConfig
from flower_app.data.partition import take_partition
from flower_app.data.sources import load_rows, passages
from flower_app.data.tables import DataError
from tests.flower_app.data.helpers import files_config, write_jsonl

ROWS = [{"text": f"Satz {i}: größer, 世界", "label": f"l{i % 4}"} for i in range(24)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def test_builtin_text_is_complete_and_keeps_its_topics() -> None:
    rows = load_rows(DataConfig(partitioner="natural"))
    topics = pydoc_data.topics.topics
    assert set(rows["topic"]) == set(topics)
    joined = Counter("\n".join(rows["text"]).split())
    assert joined == Counter("".join(f"{text}\n" for text in topics.values()).split())
    assert max(len(text) for text in rows["text"]) <= 2000


def test_passages_keep_paragraphs_together() -> None:
    assert passages("aa\n\nbb\r\n\r\n\n\ncc", 6) == ["aa\n\nbb", "cc"]
    assert passages("a\nb\nccccc", 3) == ["a\nb", "ccccc"]
    assert passages("\n\n \n\n", 3) == []
    long = "\n".join(f"line {i}" for i in range(100))
    assert "\n".join(passages(long, 50)) == long


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_tables_are_read_with_their_columns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, ROWS)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif suffix == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(ROWS)
    config = files_config(path, partitioner="natural", partition_by="label")
    assert load_rows(config).to_list() == [dict(sorted(row.items())) for row in ROWS]


def test_csv_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('q,a\n"007, or","NA"\n1,\n', encoding="utf-8")
    rows = load_rows(files_config(path, prompt_column="q", completion_column="a"))
    assert rows.to_list() == [{"a": "NA", "q": "007, or"}, {"a": "", "q": "1"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,y\nhello you,1,\nthird one,2,\n", "line 2 has 3 fields, the header 2; quote commas"),
        ("text,y\nfine,1\n\none, two, three,2\n", "line 4 has 4 fields, the header 2"),
        ('text,y\n"two\nlines",1\nshort\n', "line 4 has 1 field, the header 2"),
        ('text,y\nfine,1\n"open,1\nfine,1\n', "line 3 has 1 field, .*close all quotes"),
        ("text,y,text\na,1,b\n", "several columns of one name: text$"),
        ("a;text\n1;one, two\n", "line 2 has 2 fields, the header 1; is the separator ';'"),
    ],
)
def test_a_csv_that_would_shift_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.csv").write_text("text,y\nfine,1\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text(content, encoding="utf-8")
    for path in (tmp_path, tmp_path / "b.csv"):
        with pytest.raises(DataError, match=rf"b\.csv.* {words}"):
            load_rows(files_config(path))


def test_a_regular_csv_passes_the_check(tmp_path: Path) -> None:
    path, long = tmp_path / "rows.csv", "x" * 200_000
    # With a mark, blank lines, what DataFrame.to_csv calls its index, and a cell of two lines.
    path.write_text(f'\ufeff\n,text\r\n\n0,{long}\n  \n1,"a, ""b""\n\nc"\n2,\n\n', "utf-8")
    assert load_rows(files_config(path))["text"] == [long, 'a, "b"\n\nc', ""]
    path.write_text("text\n\na\n\nb", encoding="utf-8")
    assert load_rows(files_config(path))["text"] == ["a", "b"]


def test_csv_files_of_a_folder_may_order_their_columns_but_not_differ(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,y\na,1\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("y,text\n2,b\n", encoding="utf-8")
    assert load_rows(files_config(tmp_path))["text"] == ["a", "b"]
    (tmp_path / "b.csv").write_text("z,text\n2,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="same columns, but only one has y, z$"):
        load_rows(files_config(tmp_path))


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[10:])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:10])
    (tmp_path / "README.md").write_text("not data", encoding="utf-8")
    assert load_rows(files_config(tmp_path))["text"] == [row["text"] for row in ROWS]


def test_hidden_files_of_a_folder_are_no_data(tmp_path: Path) -> None:
    root = tmp_path / ".data"  # what leads to the folder may be hidden
    for name in ("a.jsonl", "sub/b.jsonl", ".c.jsonl", ".git/d.jsonl", "sub/.x/y/e.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(root / name, [{"text": name}])
    assert load_rows(files_config(root))["text"] == ["a.jsonl", "sub/b.jsonl"]
    assert load_rows(files_config(root / ".c.jsonl"))["text"] == [".c.jsonl"]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_files_with_other_columns_are_named(tmp_path: Path, suffix: str) -> None:
    for name, row in (("a", {"text": "a", "q": 1}), ("b", {"text": "b", "z": 2, "Mr X said": 3})):
        (tmp_path / f"{name}.{suffix}").write_text(json.dumps(row), encoding="utf-8")
    words = rf"b\.{suffix} and .*a\.{suffix} must have the same columns, but only one has q, z, 1 "
    with pytest.raises(DataError, match=words + r"whose name may be data \(not shown\)$"):
        load_rows(files_config(tmp_path))


def test_text_files_are_cut_into_passages_and_name_their_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} " + "é" * 1500 for i in range(3)), "utf-8")
    (tmp_path / "b.txt").write_text("short", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    rows = load_rows(files_config(tmp_path, partitioner="natural", partition_by="file"))
    assert rows["file"] == ["a.txt"] * 3 + ["b.txt"]


def test_a_hub_data_set_is_read_by_its_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_list(ROWS[:20]).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    Dataset.from_list(ROWS[20:]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    config = DataConfig(source="hub", path=str(tmp_path), split="test")
    assert load_rows(config)["text"] == [row["text"] for row in ROWS[20:]]
    with pytest.raises(ValueError, match=r"data\.split='dev'.*cannot be loaded"):
        load_rows(DataConfig(source="hub", path=str(tmp_path), split="dev"))
    with pytest.raises(ValueError, match="data set 'nobody/nothing-here' .* cannot be loaded"):
        load_rows(DataConfig(source="hub", path="nobody/nothing-here"))


def test_a_node_reads_its_own_file_whatever_the_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", ROWS)
    config = DataConfig(partitioner="natural")  # by `topic`, which the file does not have
    assert len(load_rows(config, str(path))) == len(ROWS)


def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path) -> None:
    def refused(config: DataConfig, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            load_rows(config)

    refused(DataConfig(source="files"), r'node-config "data-path=')
    refused(files_config(tmp_path / "no.jsonl"), r"no data at .*no\.jsonl.*absolute")
    refused(files_config(tmp_path), "must hold files of one of the formats .*none of them")
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    refused(files_config(tmp_path / "a.txt"), r"a\.txt is empty")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused(files_config(tmp_path / "a.txt"), r"a\.txt is not UTF-8")
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    refused(files_config(tmp_path), "one of the formats .*got json, txt")
    refused(
        files_config(tmp_path / "b.jsonl", text_column="texts"),
        r"no column 'texts' \(data\.text_column\); it has text, label; did you mean 'text'\?",
    )
    refused(
        files_config(tmp_path / "b.jsonl", partitioner="natural", partition_by="topic"),
        r"no column 'topic' \(data\.partition_by\)",
    )
    (tmp_path / "c.csv").write_text("text\n", encoding="utf-8")
    refused(files_config(tmp_path / "c.csv"), r"c\.csv holds no documents$")
    (tmp_path / "c.csv").write_bytes(b"text,y\nfine,1\ncaf\xe9,2\n")
    refused(files_config(tmp_path / "c.csv"), r"c\.csv is not UTF-8 text, in line 3")
    (tmp_path / "c.csv").write_text("a;text\n1;x\n", encoding="utf-8")
    refused(files_config(tmp_path / "c.csv"), "is the separator ';'\\? only commas are read")
    (tmp_path / "blank.jsonl").write_text("\n", encoding="utf-8")
    refused(files_config(tmp_path / "blank.jsonl"), r"blank\.jsonl holds no documents$")
    (tmp_path / "d.parquet").write_text("no parquet", encoding="utf-8")
    refused(files_config(tmp_path / "d.parquet"), r"d\.parquet cannot be read as parquet")


@pytest.mark.parametrize("bad", ['{"text": "x"', "text", "3"])
def test_a_wrong_jsonl_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n\n' + bad + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 3 is not"):
        load_rows(files_config(path))


PARTITIONERS = ["iid", "natural", "dirichlet", "linear", "square", "exponential"]


@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("partitions", [1, 3])
def test_partitions_are_disjoint_and_exhaustive(partitioner: str, partitions: int) -> None:
    config = DataConfig(partitioner=partitioner, partition_by="label", alpha=5.0)
    rows = Dataset.from_list([{"text": str(i), "label": f"l{i % 7}"} for i in range(60)])
    parts = [
        take_partition(rows, config, partition=k, partitions=partitions, seed=3)
        for k in range(partitions)
    ]
    again = take_partition(rows, config, partition=0, partitions=partitions, seed=3)
    other = take_partition(rows, config, partition=0, partitions=partitions, seed=4)
    assert all(len(part) for part in parts)
    assert sorted(int(t) for part in parts for t in part["text"]) == list(range(60))
    assert again["text"] == parts[0]["text"]
    assert other["text"] != parts[0]["text"]
    sizes = [len(part) for part in parts]
    if partitioner == "iid":
        assert max(sizes) - min(sizes) <= 1
    if partitioner in ("linear", "square", "exponential"):
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("partitions", [2, 10, 30, 79])
def test_natural_gives_every_topic_to_one_client(partitions: int) -> None:
    config = DataConfig(partitioner="natural")
    rows = load_rows(config)
    owners = [
        set(take_partition(rows, config, partition=k, partitions=partitions, seed=0)["topic"])
        for k in range(partitions)
    ]
    assert sum(len(topics) for topics in owners) == 79
    assert set().union(*owners) == set(rows["topic"])
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_what_cannot_be_divided_is_refused_in_words() -> None:
    rows = Dataset.from_list(ROWS[:6])

    def refused(words: str, partition: int = 0, partitions: int = 2, **values: object) -> None:
        config = DataConfig(**values)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words):
            take_partition(rows, config, partition=partition, partitions=partitions, seed=0)

    refused(r"partition 2 is not in 0\.\.1", partition=2)
    refused("6 documents cannot be divided among 7 clients", partitions=7)
    refused("has 4 values.*too few for 5", 0, 5, partitioner="natural", partition_by="label")
    refused("dirichlet cannot divide 6 documents among 6 clients.*larger data.alpha", 0, 6,
            partitioner="dirichlet", partition_by="label", alpha=0.01)  # fmt: skip
    refused("square cannot divide 6 documents", 0, 6, partitioner="square")
    rows = Dataset.from_list([{"text": "a", "label": None}, {"text": "b", "label": "x"}])
    refused("'label' has rows without a value", partitioner="natural", partition_by="label")
