"""The figures are those of plain PyTorch, and the same in each way that a model is run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import ByT5Tokenizer, PreTrainedModel
from typer.testing import CliRunner

from conf.schema import LinkConfig
from flower_app.serving.server import Serving, running
from models import Cut, build_scratch, load_whole
from models.tiny import byte_llama, roughen
from simulations.cli.app import app
from simulations.evaluate.evaluate import Question, run_evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("ab", "ababab"), ("a longer prompt: ", "xyz"), ("ab", "abab"), ("12", "3456789")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model that has learned two pairs by heart; the third stops where it goes on."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("model")
    model = roughen(build_scratch(byte_llama(32, 4, 64), 0))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        losses = [_loss(model, *pair) for pair in PAIRS[:2]]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    model.save_pretrained(place)
    ByT5Tokenizer(extra_ids=0).save_pretrained(place)
    return place


def coded(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def _loss(model: PreTrainedModel, prompt: str, completion: str) -> torch.Tensor:
    """Summed over the completion and its end."""
    own, after = coded(prompt), [*coded(completion), 1]
    logits = model(torch.tensor([own + after])).logits[0, len(own) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(after), reduction="sum")


def _right(model: PreTrainedModel, prompt: str, completion: str) -> int:
    """How many of the completion's tokens are the likeliest."""
    own, after = coded(prompt), [*coded(completion), 1]
    chosen = model(torch.tensor([own + after])).logits[0, len(own) - 1 : -1].argmax(-1)
    return sum(a == b for a, b in zip(chosen.tolist(), after, strict=True))


def paired(folder: Path) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in PAIRS]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


def evaluated(folder: Path, data: Path, **more: Any) -> dict[str, Any]:
    return run_evaluation(Question(model=str(folder), data=data, **more), say=lambda _: None)


def test_answers_are_scored_and_generated(folder: Path, tmp_path: Path) -> None:
    serving = Serving(
        sources=(("other", str(tmp_path / "other")), ("m", str(folder))),
        access=tmp_path / "access",
        link=LinkConfig(bind="127.0.0.1:0"),
        cut=Cut(1, 1),
    )
    shutil.copytree(folder, tmp_path / "other")
    changed = roughen(load_whole(str(folder)), 1)
    changed.save_pretrained(tmp_path / "other")
    with running(serving, say=print) as server:
        asked = {"how": "all", "cut": Cut(1, 1), "access": server.files[0], "batch_size": 3}
        result = evaluated(folder, paired(tmp_path), **asked)
        server.stop()

    model = load_whole(str(folder))
    tokens = sum(len(text) + 1 for _, text in PAIRS)
    with torch.no_grad():
        want = sum(float(_loss(model, *pair)) for pair in PAIRS) / tokens
        right = sum(_right(model, *pair) for pair in PAIRS)
    assert (result["examples"], result["answers"], result["tokens"]) == (4, 4, tokens)
    for way in ("split", "unsplit", "served"):
        figures = result[way]
        assert figures["loss"] == pytest.approx(want, abs=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(want), rel=1e-4)
        assert figures["exact_match"] == 0.5
        assert figures["token_accuracy"] == right / tokens
    assert 11 < right < tokens
    assert result["loss_gap"] < 1e-5


def test_text_has_no_answers_and_is_read_in_contexts(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("one " * 12, "two", "3")))

    def changed(*changes: str, **more: Any) -> dict[str, Any]:
        return evaluated(folder, path, cut=Cut(1, 2), changes=changes, **more)

    whole, pieces = changed(), changed("data.context=16")
    assert (whole["examples"], pieces["examples"]) == (3, 5)
    assert whole["split"]["exact_match"] is None
    assert pieces["tokens"] == whole["tokens"] - 3  # the first of each piece is not predicted
    assert changed(limit=1)["examples"] == 1
    with pytest.raises(ValueError, match="data.context=65 exceeds the 64 positions"):
        changed("data.context=65")
    with pytest.raises(ValueError, match="'train.lr=1': what may be changed here is data.KEY"):
        changed("train.lr=1")
    with pytest.raises(
        ValueError, match="--how is 'both', must be one of split, unsplit, served, all"
    ):
        changed(how="both")


def test_the_command_prints_figures(folder: Path, tmp_path: Path) -> None:
    line = ["eval", str(folder), "--cut", "1,1", "--data", str(paired(tmp_path)), "--json"]
    told = CliRunner().invoke(app, [*line, "--how", "unsplit", "--no-generate"])
    assert told.exit_code == 0, told.output
    result = json.loads(told.stdout)
    assert result["unsplit"]["exact_match"] is None
    assert result["cut"] == "1,1"
    refused = CliRunner().invoke(app, [*line, "--how", "served"])
    assert "--access FILE" in refused.stderr
    refused = CliRunner().invoke(app, ["eval", str(folder), "--data", str(tmp_path / "no.txt")])
    assert refused.exit_code == 2
    assert "--cut" in refused.stderr
