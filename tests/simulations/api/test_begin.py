"""The command: what it is told and says, and a split model behind it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from models import Cut
from simulations.api.begin import How, begin
from simulations.api.serve import Server, Settings, listen
from simulations.talk.opening import Asked, opened
from simulations.talk.speaker import Speaker
from tests.simulations.api.helpers import PROMPT, encoded, greedy, logprobs_of


@pytest.fixture
def folder(speaker: Speaker, tmp_path: Path) -> Path:
    """Return a folder with the model."""
    speaker.model.save_pretrained(tmp_path / "swallow")
    speaker.tokenizer.save_pretrained(tmp_path / "swallow")
    return tmp_path / "swallow"


def test_a_split_model_answers_as_the_unsplit_one(speaker: Speaker, folder: Path) -> None:
    with (
        opened(Asked(source=str(folder), cut=Cut(1, 1))) as split,
        listen("127.0.0.1", 0) as taken,
        Server(split, Settings(), taken).running() as url,
        OpenAI(base_url=url, api_key="none") as client,
    ):
        said = client.chat.completions.create(
            model="swallow", messages=[{"role": "user", "content": PROMPT}],
            temperature=0, max_tokens=24,
        )  # fmt: skip
        scored = client.completions.create(
            model="swallow", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1
        )
    assert said.choices[0].message.content == speaker.tokenizer.decode(greedy(speaker, PROMPT, 24))
    ids = encoded(PROMPT)
    expected = logprobs_of(speaker, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert scored.choices[0].logprobs
    assert scored.choices[0].logprobs.token_logprobs
    assert scored.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        expected.tolist(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (How(bind="0.0.0.0:0"), "an API key is needed"),
        (How(bind="nowhere"), "HOST:PORT"),
        (How(key="short"), "8 or more"),
        (How(certificate=Path("a.pem")), "belong together"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_looked_for(how: How, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        begin(Asked(source="/no/such/model", cut=Cut(1, 1)), how, print)


def test_an_address_that_is_taken_is_said_in_words() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}: nothing can listen there"):
            begin(Asked(source="/no/such/model"), How(bind=f"127.0.0.1:{port}"), print)


def test_a_missing_extra_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "simulations.api.app":
            raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"fastapi is not installed: pip install 'graft\[api\]'"):
        begin(Asked(source="a"), How(), print)
