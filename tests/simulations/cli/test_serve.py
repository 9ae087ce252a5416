"""`graft serve` as it is called: what it prints, how it ends, and what it refuses in words."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer
from typer.testing import CliRunner

from conf.schema import LinkConfig
from flower_app.serving.client import connect
from simulations.cli.app import app
from tests.models.helpers import ids, saved

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing is to be served"),
        (["/none/such"], "does not exist; nor is it a run"),
        (["none-such", "--cut", "1"], "cut '1': write 2,1 for 2 blocks below"),
        (["--name", "a"], "--name takes NAME=SOURCE"),
        (["x", "--codec", "fp99"], "fp99"),
        (["x", "--bind", "0.0.0.0:1"], "link.advertise"),
    ],
)
def test_what_is_wrong_is_said_in_words(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments, "--access", str(tmp_path / "access")])
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "access").exists()


@pytest.mark.slow
def test_another_process_serves_says_so_and_ends_when_asked(tmp_path: Path) -> None:
    whole = saved(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-P", "-m", "simulations.cli.app", "--verbose", "serve"]
    arguments = [tmp_path / "model", "--cut", "1,1", "--access", tmp_path, "--bind", "127.0.0.1:0"]
    server = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout is not None
    lines = []
    for line in server.stdout:
        lines.append(line)
        if line.startswith("ready"):
            break
    link = LinkConfig(timeout=20.0, grace=5.0)
    with connect(tmp_path / "client-1.json", tmp_path / "model", link=link) as client:
        got = client.model.generate(ids(batch=1), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    server.send_signal(signal.SIGINT)
    rest, _ = server.communicate(timeout=30)

    told = "".join(lines) + rest
    assert torch.equal(got, whole.generate(ids(batch=1), max_new_tokens=8, do_sample=False))  # type: ignore[operator]
    assert server.returncode == 0
    for words in ("model    model: llama of 4 blocks", "client-1.json", ": opened", ": ended",
                  "stopping", "stopped"):  # fmt: skip
        assert words in told, told
    assert "Traceback" not in told
