"""The study of codecs: nothing is lost where nothing is rounded, and a bad codec is seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.sections.link import CROSSINGS
from models.tiny import byte_llama
from simulations.study.codecs import study as tool
from simulations.study.codecs.report import markdown, summary
from simulations.study.codecs.settings import Condition, Mix, condition, parse_mix
from strategies.transport import codec as folder_of_codecs

TOYS = '''
"""A codec that forgets all, and one that forgets nothing and has a name of its own."""

import torch

from strategies.transport.codec.codec import Codec
from strategies.transport.codec.raw import Fp32


class Same(Fp32):
    """The base."""

    name = "same"


class Zeros(Codec):
    """One byte, and zeros."""

    name = "zeros"

    def sizes(self, rows, width):
        return 1, 1

    def pack(self, rows_ND, generator):
        return b"0"

    def unpack(self, data, shape):
        return torch.zeros(shape)
'''
MIXED = "h1=bf16 h2=fp32 grad_h2=fp16 grad_h1=fp32"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path = tmp_path_factory.mktemp("codecs")
    (path / "toys.py").write_text(TOYS)
    folder_of_codecs.__path__.append(str(path))
    yield
    folder_of_codecs.__path__.remove(str(path))
    sys.modules.pop(f"{folder_of_codecs.__name__}.toys", None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Condition:
    """A model and texts of many lengths: most batches have padding."""
    path = tmp_path_factory.mktemp("tiny")
    line = "the cat sat on the mat and slept"
    lines = [json.dumps({"text": (line[n % 32 :] + line)[: 31 - n % 7]}) for n in range(40)]
    (path / "texts.jsonl").write_text("\n".join(lines))
    tree = {
        "model": {"tokenizer": "bytes", "scratch": byte_llama(16, 3, 32)},
        "cut": {"bottom": 1, "top": 1},
        "tuning": {"bottom": "full", "trunk": "full", "top": "full"},
        "data": {
            "source": "files",
            "path": str(path / "texts.jsonl"),
            "context": 32,
            "heldout": 0.2,
        },
    }
    (path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return Condition(
        model=str(path / "tiny.yaml"), steps=6, batch_size=4, lr=1e-2, before=0, heldout=8
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def _without_times(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {key: _without_times(each) for key, each in tree.items() if "ms_per_mb" not in key}


def mixes() -> list[Mix]:
    return [parse_mix(name) for name in ("bf16", MIXED, "same", "zeros")]


@pytest.fixture(scope="module")
def result(tiny: Condition, folder: Path, toys: None) -> dict[str, Any]:
    return tool.study_codecs(tiny, mixes(), (0, 1), folder, say=lambda _: None)


def test_what_rounds_nothing_loses_nothing_and_takes_32_bits(result: dict[str, Any]) -> None:
    for name in ("fp32", "same"):  # the latter is trained by itself, and last
        row = result["tiny"]["codecs"][name]
        assert row["factor"] == 1.0
        for way in ("gap_with", "gap_without"):
            assert row[way] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        for crossing in CROSSINGS:
            assert row["crossings"][crossing]["bits"] == 32.0
            assert row["crossings"][crossing]["error"] == 0.0


def test_training_lowers_the_loss_that_gaps_are_shares_of(result: dict[str, Any]) -> None:
    assert result["tiny"]["loss"]["high"] < result["tiny"]["loss_start"]["low"] - 0.3


def test_each_crossing_has_its_own_codec(result: dict[str, Any]) -> None:
    crossings = result["tiny"]["codecs"]["bf16/fp32/fp16/fp32"]["crossings"]

    bits = {name: round(each["bits"], 1) for name, each in crossings.items()}
    assert bits == {
        "h1": 16.0,
        "h2": 32.0,
        "grad_h2": pytest.approx(16.0, abs=0.1),
        "grad_h1": 32.0,
    }
    assert 1e-4 < crossings["h1"]["error"] < 2**-8
    assert crossings["h2"]["error"] == crossings["grad_h1"]["error"] == 0.0
    assert 1e-5 < crossings["grad_h2"]["error"] < 2**-11


def test_a_codec_that_forgets_all_is_seen(result: dict[str, Any]) -> None:
    codecs = result["tiny"]["codecs"]

    assert list(codecs)[-1] == "zeros"  # by the bytes it saves
    assert codecs["zeros"]["crossings"]["h1"]["error"] == 1.0
    assert codecs["zeros"]["gap_without"]["low"] > 0.03
    assert codecs["zeros"]["gap_with"]["low"] > 0.03
    assert codecs["zeros"]["gap_with"] != codecs["zeros"]["gap_without"]
    assert abs(codecs["bf16"]["gap_with"]["mean"]) < 0.003


def test_a_study_that_was_cut_off_gives_the_same_table(
    result: dict[str, Any], tiny: Condition, folder: Path, tmp_path: Path
) -> None:
    lines = (folder / tool.RUNS).read_text().splitlines(keepends=True)
    (tmp_path / tool.RUNS).write_text("".join(lines[:2]) + lines[2][:100])
    said: list[str] = []

    again = tool.study_codecs(tiny, mixes(), (0, 1), tmp_path, say=said.append)

    assert len(said) == len(lines) - 2
    assert _without_times(again) == _without_times(result)


def test_nothing_runs_twice(result: dict[str, Any], tiny: Condition, folder: Path) -> None:
    said: list[str] = []

    assert tool.study_codecs(tiny, mixes(), (0, 1), folder, say=said.append) == result
    assert said == []
    assert (folder / "codecs.md").read_text() == markdown(result)
    assert (folder / "codecs.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "codecs.json").read_text()) == result


def test_a_codec_without_its_seeds_base_is_left_out(result: dict[str, Any], folder: Path) -> None:
    runs = [run for run in tool.read_runs(folder) if (run["codec"], run["seed"]) != ("fp32", 1)]

    assert {tuple(row["seeds"]) for row in summary(runs)["tiny"]["codecs"].values()} == {(0,)}


def test_other_settings_are_refused_in_words(
    result: dict[str, Any], tiny: Condition, folder: Path
) -> None:
    other = Condition(model=tiny.model, steps=7, batch_size=4, lr=1e-2, before=0, heldout=8)

    with pytest.raises(ValueError, match="'tiny' with other settings .steps=6 there, 7 here."):
        tool.study_codecs(other, mixes(), (0,), folder)


def test_epochs_take_the_same_steps_over_fewer_examples() -> None:
    once, often = condition("demo", steps=40), condition("demo", steps=40, epochs=5)

    assert (once.examples, often.examples) == (0, 8 * 8)
    assert often.title == "demo, 5 epochs"
    assert often.config(3).train == once.config(3).train
    assert often.config(3).seed == 3


def test_a_frozen_bottom_saves_a_crossing(tiny: Condition, tmp_path: Path) -> None:
    frozen = replace(tiny, frozen_bottom=True)

    base = tool.study_codecs(frozen, [], (0,), tmp_path)["tiny, frozen bottom"]["codecs"]["fp32"]

    assert condition("smollm2", frozen_bottom=True).config(0).tuning.bottom == "frozen"
    assert base["crossings"]["grad_h1"]["bits"] == 0.0
    assert base["factor"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fp33", "--codecs, h1.*fp33"),
        ("h1=bf16 grad_h2=fp33", "--codecs, grad_h2.*fp33"),
        ("h1=bf16 grad_h3=bf16", "no 'grad_h3'"),
    ],
)
def test_a_wrong_mix_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_mix(text)
