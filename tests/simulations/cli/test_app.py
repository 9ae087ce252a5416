"""The `graft` command: quick help, how each command ends, and what another file adds to it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner, Result

import simulations.cli
from simulations.cli.app import app, build

Graft = Callable[..., Result]

TOY = """
import typer

commands = typer.Typer()

@commands.command(rich_help_panel="Look")
def toy(how: str, size: int = 1) -> None:
    \"\"\"End in one way or another.\"\"\"
    ends = {
        "well": typer.Exit(0),
        "badly": typer.Exit(3),
        "user": ValueError("a value that is wrong"),
        "machine": OSError("a file that is not there"),
        "run": RuntimeError("a run that did not complete"),
        "stopped": KeyboardInterrupt(),
        "unheard": BrokenPipeError(32, "Broken pipe"),
        "refused": typer.Abort(),
    }
    if how != "on":
        raise ends[how]
    typer.echo(f"toy of {size}")
"""


def _graft(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Graft:
    """`graft` with one more file in its folder."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(simulations.cli, "__path__", [*simulations.cli.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "simulations.cli.toy", raising=False)
    graft = build()
    return lambda *arguments: CliRunner().invoke(graft, list(arguments))


def _commands() -> list[list[str]]:
    """Every command, those of groups too."""
    root = typer.main.get_command(app)
    assert isinstance(root, click.Group)
    found = []
    for name, command in root.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {}
        found += [[name], *([name, each] for each in inner)]
    return found


def test_help_names_every_tool_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from simulations.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'flwr', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "run", "deployment-demo", "parity", "bench", "config", "runs", "plot"):
        assert f" {command} " in done.stdout
    panels = [done.stdout.index(f"─ {panel} ─") for panel in ("Run", "Look", "Check and measure")]
    assert panels == sorted(panels)


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_help_ends_well_and_an_unknown_option_in_code_2(command: list[str]) -> None:
    helped, odd = _graft(*command, "--help"), _graft(*command, "--no-such-option")

    assert (helped.exit_code, helped.stderr) == (0, "")
    assert " ".join(command) in helped.stdout
    assert (odd.exit_code, odd.stdout) == (2, "")
    assert "--no-such-option" in odd.stderr
    assert "error: 2" not in odd.stderr


def test_readme_names_every_command() -> None:
    text = (Path(simulations.cli.__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    groups = {command[0] for command in _commands() if len(command) > 1}
    names = [
        " ".join(command) for command in _commands() if command[0] not in groups or command[1:]
    ]
    assert [name for name in names if not re.search(rf"(graft|make) {name}\b", text)] == []


@pytest.mark.parametrize("command", ["run", "resume", "plot"])
def test_a_missing_argument_is_named(command: str) -> None:
    result = _graft(command)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "Missing argument" in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run demo --clients=-1", "-1 is not in the range"),
        ("resume . --clients=-1", "-1 is not in the range"),
        ("parity --model /nope/here", "error: --model /nope/here does not exist"),
        ("parity --all --model /nope/here", "error: --model /nope/here does not exist"),
        ("bench step --wire bf61", "did you mean 'bf16'?"),
        ("bench load --strategy merge", "did you mean 'merged'?"),
        ("bench soak --strategy merge", "did you mean 'merged'?"),
    ],
)
def test_a_wrong_value_is_refused_in_words_and_code_2(command: str, words: str) -> None:
    result = _graft(*command.split())

    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("how", "code", "stderr"),
    [
        ("on", 0, ""),
        ("well", 0, ""),
        ("badly", 3, ""),
        ("user", 2, "error: a value that is wrong\n"),
        ("machine", 2, "error: a file that is not there\n"),
        ("run", 1, "error: a run that did not complete\n"),
        ("stopped", 130, ""),
        ("unheard", 1, ""),
    ],
)
def test_every_end_has_its_code_and_its_words(toy: Graft, how: str, code: int, stderr: str) -> None:
    result = toy("toy", how)

    assert (result.exit_code, result.stderr) == (code, stderr)


def test_abort_is_no_error_of_a_command(toy: Graft) -> None:
    assert toy("toy", "refused").exit_code == 1
    assert "error:" not in toy("toy", "refused").stderr


def test_a_new_command_is_one_file(toy: Graft) -> None:
    assert toy("toy", "on", "--size", "3").stdout == "toy of 3\n"
    assert " toy " in toy("--help").stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "from simulations.cli.app import app; app(['config', 'demo'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as graft:
        assert graft.stdout is not None
        assert graft.stderr is not None
        graft.stdout.close()  # before a line is written, as `| head -0` does
        assert graft.stderr.read() == b""
        assert graft.wait() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "demo", "train.lrr=1"], "did you mean 'train.lr'"),
        (["config", "dmeo"], "unknown experiment 'dmeo'"),
        (["run", "demo", "train.lr=fast"], "train.lr"),
        (["plot", "no-such-run"], "is not a run"),
        (["parity"], "give either --model PATH_OR_ID or --families"),
        (["parity", "--model", "x", "--cut", "two,1"], "--cut two,1"),
        (["chaos", "--policy", "none"], "--policy none: there are"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments: list[str], words: str) -> None:
    result = _graft(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
