"""`graft chat` from its command line: through pipes, saved and gone on with, refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from simulations.cli.app import app
from tests.simulations.talk.helpers import bytes_tokenizer, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return folder


def _graft(*arguments: str, given: str = "") -> Result:
    return CliRunner().invoke(app, ["chat", *arguments], input=given)


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


def test_what_is_wrong_is_said_in_one_line_and_in_the_exit_code(model: Path) -> None:
    result = _graft(str(model), "--greedy", "--temperature", "1")
    assert (result.exit_code, "--greedy is temperature 0" in result.stderr) == (2, True)
    result = _graft(str(model), "--cut", "1,0", "--top-p", "2")
    assert (result.exit_code, "top_p=2.0: must be" in result.stderr) == (2, True)
    result = _graft(str(model), "--cut", "1,0", "--max-tokens", "1", given="/undoo\none\n")
    assert (result.exit_code, "did you mean /undo?" in result.stderr) == (1, True)
    assert result.stdout.endswith("\n"), "what came after was answered"
