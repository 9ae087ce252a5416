"""A client's error travels to the server: none of the data stands in it, whatever is wrong."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from conf.schema import DataConfig
from flower_app.data import client as data
from flower_app.data import sources, tables
from flower_app.data.client import load_client_data
from flower_app.data.partition import take_partition
from flower_app.data.text import encode_chat
from tests.flower_app.data.helpers import CHAT, byte_tokenizer, files_config, write_jsonl

SECRET = "Zyx-Geheim-4711"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def refusal(work: Callable[[], Any]) -> str:
    """Return the words of the error, after a look for the secret in them and in the traceback."""
    with pytest.raises(tables.DataError) as caught:
        work()
    told = "".join(traceback.format_exception(caught.value))
    assert not any(part in told for part in (SECRET, "Geheim", "4711"))
    return str(caught.value)


def load(path: Path, **values: Any) -> Callable[[], Any]:
    tokenizer = byte_tokenizer(CHAT)
    config = files_config(path, **values)
    return lambda: load_client_data(config, tokenizer, partition=0, partitions=1, seed=0)


BAD_FILES = {
    "a.jsonl": ('{"text": "x"}\n{"text": %s}\n', "line 2 is not JSON: Expecting value"),
    "b.jsonl": ('{"text": "x"}\n{"text": "%s\n', "line 2 is not JSON: Unterminated string"),
    "c.jsonl": ('{"text": "x"}\n{"text": "%s\\q"}\n', "line 2 is not JSON: Invalid"),
    "d.jsonl": ('{"text": "x"}\n["%s"]\n', "line 2 is not a JSON object, got list"),
    "e.jsonl": ('{"text": "x", "text": "%s"}\n', "cannot be read as json"),
    "f.jsonl": ('{"text": {"who": "%s"}}\n', "column 'text' must hold text, got dict"),
    "g.json": ('[{"text": "x"},\n {"text": %s}]', "line 2, column 11 is not JSON"),
    "h.json": ('[{"text": "x"}, ["%s"]]', "entry 2 is not a JSON object, got list"),
    "i.json": ('"%s"', "entry 1 is not a JSON object, got str"),
    "j.csv": ("text,b\nx,y\n%s,1,2\n", "line 3 has 3 fields, the header 2"),
    "k.csv": ('text,b\n"%s,1\n', "line 2 has 1 field, the header 2"),
    "k2.csv": ('text,b\nx,"%s 1\n', "EOF inside string"),
    "k3.csv": ("%s 1,%s 1\nx,y\n", "several columns of one name: 1 whose name may be data"),
    "k4.csv": ("%s;text\nx;y\n", "no column 'text'.*is the separator ';'"),
    "k5.csv": ("text %s\nx\n", r"1 whose name may be data \(not shown\)$"),
    "l.csv": ("Mr %s was here,2\nx,y\n", "no column 'text'.*2 whose names may be data"),
    "m.csv": ('"%s' + "x" * 200_000 + '"\n', "holds no documents"),
    "n.csv": ("text\n%s\udcff\n", "is not UTF-8 text, in line 2"),
    "o.csv": ("t\udcffxt%s\nx\n", "is not UTF-8 text, in line 1"),
    "p.txt": ("x\n\n%s\udcff", "is not UTF-8 text, in line 3"),
    "q.parquet": ("%s", "cannot be read as parquet: Parquet magic bytes not found"),
    "r.parquet": ("PAR1%sPAR1", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_without_its_content(tmp_path: Path, name: str) -> None:
    content, words = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content.replace("%s", SECRET).encode("utf-8", "surrogateescape"))
    told = refusal(load(path))
    assert str(path) in told
    assert re.search(words, told), told


def test_a_bad_row_is_refused_without_its_content(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("{{ raise_exception('no ' + messages[-1].content) }}")
    for messages, words in (
        (SECRET, "got str"),
        ([SECRET], "got one with a str (message 1 of 1)"),
        ([{"content": SECRET}], "got one with no role (message 1 of 1)"),
        ([{"role": "user", "content": SECRET}], "roles ['user']"),
        ([{"role": None, "content": SECRET}], "roles ['(other)']"),
    ):
        path = write_jsonl(tmp_path / "m.jsonl", [{"m": messages}])
        config = files_config(path, messages_column="m")

        def read(config: DataConfig = config) -> Any:
            return load_client_data(config, tokenizer, partition=0, partitions=1, seed=0)

        told = refusal(read)
        assert words in told
        assert f"document 0 of {path}" in told


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no ' + messages[0].content) }}",
        "{{ raise_exception(messages[0].content) }}{# raise_exception(Zyx) #}",
        "{{ raise_exception(messages[0].role) }}",
        "{{ messages[0].content.absent.more }}",
        "{{ {}[messages[0].content].x }}",
        "{{ '%d' | format(messages[0].content) }}",
    ],
)
def test_a_template_cannot_tell_what_was_said(template: str) -> None:
    turns = [{"role": SECRET, "content": SECRET}, {"role": "user", "content": SECRET}]
    told = refusal(lambda: encode_chat(turns, byte_tokenizer(template)))
    assert "['(other)', 'user']" in told


def test_a_template_may_say_its_own_words() -> None:
    tokenizer = byte_tokenizer('{{ raise_exception("Roles must alternate (u/a/u/a)!") }}')
    told = refusal(lambda: encode_chat([{"role": "user", "content": SECRET}], tokenizer))
    assert told.endswith("Roles must alternate (u/a/u/a)!")


def test_values_of_a_column_are_not_listed() -> None:
    rows = Dataset.from_list([{"text": "x", "who": f"{SECRET} {i % 2}"} for i in range(8)])
    for partitioner, words in (("natural", "has 2 values, too few"), ("dirichlet", "cannot")):
        config = DataConfig(partitioner=partitioner, partition_by="who", alpha=1e-3)

        def divide(config: DataConfig = config) -> Dataset:
            return take_partition(rows, config, partition=0, partitions=5, seed=0)

        assert words in refusal(divide)


def test_a_hub_folder_does_not_tell_its_rows(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        '{"text": "x"}\n{"text": ' + SECRET + "}\n", encoding="utf-8"
    )
    config = DataConfig(source="hub", path=str(tmp_path))
    assert "cannot be loaded: " in refusal(lambda: sources.load_rows(config))


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, OSError, MemoryError])
def test_what_nobody_foresaw_is_told_by_its_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(*args: object, **options: object) -> None:
        try:
            raise RuntimeError(SECRET)
        except RuntimeError as error:
            raise kind(f"cannot take {SECRET}") from error

    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "x"}])
    for module, name in ((data, "encode"), (sources, "read_json")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, fail)
            assert refusal(load(path)).split(": ")[-1].startswith("RuntimeError")


def test_text_that_is_not_unicode_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "' + SECRET.encode() + b'\xff"}\n')
    refusal(load(path))
    path.write_text(json.dumps({"text": SECRET + "\ud800"}), encoding="utf-8")
    refusal(load(path))
