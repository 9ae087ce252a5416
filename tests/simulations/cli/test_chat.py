"""`graft chat` from its command line: through pipes, saved and gone on with, refused in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

from flower_app.serving.source import (
    find_served,
    load_ends,
    load_tokenizer,
    load_trunk,
    load_whole_model,
)
from models import Cut
from models.remote import join_remote
from simulations.cli.app import app
from simulations.talk import opening
from simulations.talk.speaker import Sampling, Speaker
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits
from tests.simulations.talk.helpers import bytes_tokenizer, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def _in_this_process(source: str, *, cut: Cut | None = None) -> Iterator[SimpleNamespace]:
    """What `open_local` does, without the other process."""
    served = find_served(source, cut)
    trunk = LocalTrunk(GenerationEngine(load_trunk(served), Limits()))
    model = join_remote(*load_ends(served), trunk)
    yield SimpleNamespace(model=model, tokenizer=load_tokenizer(served), name=served.name)


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "open_local", _in_this_process)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


def _graft(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(app, ["chat", *arguments], input=given)


@pytest.mark.usefixtures("near")
def test_each_line_of_the_input_is_answered(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    how = ("--cut", "1,0", "--greedy", "--max-tokens", "4", "--stop", "never")
    result = _graft(str(model), *how, given=f"one\n/save {file}\n")
    assert result.exit_code == 0, result.output
    assert "tiny: /help shows the commands" in result.stderr
    saved = json.loads(file.read_text())
    assert result.stdout == saved["messages"][1]["content"] + "\n"
    assert saved["sampling"]["stop"] == ["never"]
    assert (saved["sampling"]["temperature"], saved["sampling"]["max_tokens"]) == (0, 4)

    on = ("--cut", "1,0", "--load", str(file), "--max-tokens", "2")
    result = _graft(str(model), *on, given=f"two\n/save {file}\n")
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text())
    assert [one["role"] for one in saved["messages"]] == ["user", "assistant"] * 2
    assert (saved["sampling"]["temperature"], saved["sampling"]["max_tokens"]) == (0, 2)


@pytest.mark.usefixtures("near")
def test_what_is_wrong_is_said_in_one_line_and_in_the_exit_code(model: Path) -> None:
    result = _graft(str(model), "--greedy", "--temperature", "1")
    assert (result.exit_code, "--greedy is temperature 0" in result.stderr) == (2, True)
    result = _graft(str(model), "--cut", "1,0", "--top-p", "2")
    assert (result.exit_code, "top_p=2.0: must be" in result.stderr) == (2, True)
    result = _graft(str(model), "--cut", "1,0", "--max-tokens", "1", given="/undoo\none\n")
    assert (result.exit_code, "did you mean /undo?" in result.stderr) == (1, True)
    assert result.stdout.endswith("\n"), "what came after was answered"


@pytest.mark.usefixtures("near")
def test_speculation_says_the_same_or_what_it_lacks(model: Path) -> None:
    how = ("--cut", "1,0", "--greedy", "--max-tokens", "30")
    plain = _graft(str(model), *how, given="aabaab\n")
    quick = _graft(str(model), *how, "--speculate", "lookup", given="aabaab\n")
    assert quick.exit_code == 0, quick.output
    assert quick.stdout == plain.stdout
    assert "(30 round trips" in plain.stderr
    assert "(30 round trips" not in quick.stderr
    result = _graft(str(model), *how, "--speculate", "bridge")
    assert (result.exit_code, "train.bridge=256" in result.stderr) == (2, True)


@pytest.mark.slow
def test_a_trunk_in_another_process_says_the_same(model: Path) -> None:
    how = ("--cut", "1,0", "--greedy", "--max-tokens", "8")
    result = _graft(str(model), *how, given="one\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(_whole(model, "one", 8)) + "\n"
    assert "bytes for each token through the trunk" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to talk with: give a run, such as last:demo"),
        (("last:demo", "--model", "a"), "--model belongs to a trunk that is served"),
        (("--ends", "here"), "--ends belongs to a trunk that is served"),
        (("a", "--ends", "b", "--access", "c"), "give one of RUN_OR_MODEL and --ends"),
        (("a", "--cut", "1,1", "--access", "c"), "c says where the model is cut"),
        (("last:demo",), "no finished run of experiment 'demo'"),
        (("a", "--access", "/nowhere"), "/nowhere"),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(arguments, words) -> None:
    result = _graft(*arguments)
    assert (result.exit_code, words in result.stderr) == (2, True), result.output


def _whole(model: Path, text: str, tokens: int) -> list[str]:
    """What the unsplit model says."""
    served = find_served(str(model), Cut(1, 0))
    talker = Speaker(load_whole_model(served), load_tokenizer(served), "whole")
    sampling = Sampling(temperature=0, max_tokens=tokens)
    ids = talker.prompt([{"role": "user", "content": text}])
    return [piece.text for piece in talker.stream(ids, sampling)]
