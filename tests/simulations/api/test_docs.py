"""The curl lines of docs/api.md and of the command itself do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from simulations.api.app import Access
from simulations.api.serve import Server, Settings, listen
from simulations.talk.speaker import Speaker
from tests.simulations.api.conftest import KEY

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


def run(line: str) -> str:
    environment = {**os.environ, "GRAFT_API_KEY": KEY}
    done = subprocess.run(
        ["bash", "-c", line],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


@needs_curl
def test_the_curl_lines_of_the_docs_work(project: Path, speaker: Speaker) -> None:
    page = (project / "docs" / "api.md").read_text(encoding="utf-8")
    lines = re.findall(r"```bash\n(curl .*?)```", page, re.S)
    named = Speaker(speaker.model, speaker.tokenizer, "demo")
    settings = Settings(access=Access(key=KEY))
    with listen("127.0.0.1", 0) as taken, Server(named, settings, taken).running() as url:
        said = [run(line.replace("http://127.0.0.1:8000/v1", url).replace(
            "http://127.0.0.1:8000", url.removesuffix("/v1"))) for line in lines]  # fmt: skip
    models, chat, stream, scored, health = said
    assert json.loads(models)["data"][0]["id"] == "demo"
    assert json.loads(chat)["choices"][0]["message"]["content"]
    assert stream.rstrip().endswith("data: [DONE]")
    assert '"usage": {"prompt_tokens": 10' in stream
    assert len(json.loads(scored)["choices"][0]["logprobs"]["tokens"]) == len("The module")
    assert json.loads(health)["status"] == "ok"


@needs_curl
@pytest.mark.parametrize("key", ["", KEY])
def test_the_line_that_the_command_prints_works(speaker: Speaker, key: str) -> None:
    settings = Settings(access=Access(key=key))
    with listen("127.0.0.1", 0) as taken:
        server = Server(speaker, settings, taken)
        with server.running():
            said = json.loads(run(server.curl().replace("curl ", "curl -s ", 1)))
    assert said["choices"][0]["message"]["role"] == "assistant"
