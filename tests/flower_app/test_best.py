"""The server's own evaluation, runs that end when they gain no more, and the best round's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.supercore.task_identity import TaskIdentity
from transformers import AutoModelForCausalLM

from conf.schema import Config
from flower_app.build import build_trunk, resolve_model
from flower_app.central import evaluates_centrally
from flower_app.client.ends import token_loss
from flower_app.data.client import batches, load_client_data
from flower_app.data.text import load_tokenizer
from flower_app.runs import checkpoint
from flower_app.runs.folders import find_last_run, folders
from flower_app.runs.resume import look_up
from flower_app.runs.summary import summarize
from models import build_scratch
from strategies.engine.engine import TrunkEngine
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.runs import test_resume

STRANGE = (
    "train.rounds=5 train.patience=2 output.model=best train.schedule=constant train.warmup=0 "
    "train.lr=0.03"
)
"""On Czech letters alone, what learns English gets worse after a round."""


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


def configured(tmp_path: Path, changes: str = "", text: str = "žščřďťňýáíé" * 6) -> Config:
    """With a file of the server's, whose texts are longer than a context and unlike in length."""
    own = tmp_path / "central.jsonl"
    lines = [json.dumps({"text": text[:size]}) for size in (100, 70, 20)]
    own.write_text("\n".join(lines), encoding="utf-8")
    return test_resume.configured(tmp_path, f"data.central_path={own} {changes}")


def whole_loss(model: torch.nn.Module, config: Config) -> tuple[float, int]:
    """Of an unsplit model on the server's file, one example at a time."""
    data = load_client_data(
        config.data,
        load_tokenizer(config.model),
        partition=0,
        partitions=1,
        data_path=config.data.central_path,
        seed=5,
    )
    total, tokens = 0.0, 0
    for batch in batches([*data.train, *data.heldout], 1, pad_id=0, generator=None):
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        loss, count = token_loss(logits, batch.labels)
        total, tokens = total + float(loss), tokens + count
    return total / tokens, tokens


def rounds_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {r["round"]: r for r in test_resume.records(folder) if r["kind"] == "round"}


@pytest.mark.parametrize(
    "changes",
    [
        "",
        f"{test_resume.LORA} aggregation.lora=exact",
        pytest.param("train.strategy=splitfed-v2 link.transport=messages", marks=pytest.mark.slow),
        pytest.param(
            "train.strategy=merged link.transport=messages train.sync=step", marks=pytest.mark.slow
        ),
    ],
)
def test_the_servers_evaluation_is_that_of_the_saved_model_whole(
    changes: str, tmp_path: Path
) -> None:
    """Two rounds: with residuals, what was folded in after the first must not stay."""
    config, lines = (
        configured(tmp_path, f"train.rounds=2 {changes}", "What the server has. " * 9),
        [],
    )

    folder = test_resume.run(config, InProcessGrid(2), lines=lines)

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    loss, tokens = whole_loss(model, config)
    told = {number: record["central"] for number, record in rounds_of(folder).items()}
    assert told[2]["loss"] == pytest.approx(loss, abs=1e-5)
    assert told[2]["num-tokens"] == tokens
    assert abs(told[1]["loss"] - told[2]["loss"]) > 1e-3
    assert told[0]["loss"] == pytest.approx(5.56, abs=0.1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["central_loss_last"] == told[2]["loss"]
    assert summary["best_loss"] == min(told[1]["loss"], told[2]["loss"])
    assert any(f"central loss {told[2]['loss']:.4f}" in line for line in lines)


def test_the_servers_evaluation_has_no_dropout_though_nobody_else_evaluates(tmp_path: Path) -> None:
    """No round has been open before that of round 0."""
    changes = "train.rounds=1 data.heldout=0 model.scratch.attention_dropout=0.5"
    config = configured(tmp_path, changes, "What the server has. " * 9)

    folder = test_resume.run(config, InProcessGrid(2))

    first = build_scratch(config.model.scratch, config.seed).eval()
    last = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    for number, model in enumerate((first, last)):
        told = rounds_of(folder)[number]["central"]["loss"]
        assert told == pytest.approx(whole_loss(model, config)[0], abs=1e-5)


def test_a_best_round_is_one_by_which_the_run_was_judged(tmp_path: Path) -> None:
    """The held-out loss is none of those where the server has a file of its own."""
    config = configured(tmp_path)
    told = {"round": 1, "clients": [], "missing": {}, "tokens": 1, "bytes_up": 0, "bytes_down": 0}
    rounds = [{**told, "evaluate": {"loss": 2.0}}]

    assert "best_round" not in summarize(config, rounds, 1.0)
    assert summarize(test_resume.configured(tmp_path), rounds, 1.0)["best_round"] == 1


def test_a_run_that_no_longer_gains_ends_and_leaves_its_best_round(tmp_path: Path) -> None:
    """By the server's loss, though the held-out one falls; the best is kept without checkpoints."""
    config, lines = configured(tmp_path, f"{STRANGE} output.checkpoint_every=0"), list[str]()

    folder = test_resume.run(config, InProcessGrid(2), lines=lines)

    told = rounds_of(folder)
    central = [told[number]["central"]["loss"] for number in (0, 1, 2, 3)]
    assert min(central) == central[1]
    assert told[2]["evaluate"]["loss"] < told[0]["evaluate"]["loss"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("finished", 3)
    assert (summary["best_round"], summary["model_round"]) == (1, 1)
    assert "of round 1 for 2 rounds (train.patience=2)" in summary["stopped_early"]
    assert any("stops after round 3 of 5: the loss has not fallen" in line for line in lines)
    stop = next(r for r in test_resume.records(folder) if r["kind"] == "stop")
    assert stop["why"] == summary["stopped_early"]
    assert find_last_run("demo", tmp_path) == folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert whole_loss(model, config)[0] == pytest.approx(central[1], abs=1e-5)
    (kept,) = (path for number, path in folders(folder) if number == 1)
    joint = checkpoint.read(kept).state["joint"]
    saved = test_resume.weights(folder)
    assert all(torch.equal(saved[n.removeprefix("tensor/")], joint[n]) for n in joint)

    with pytest.raises(ValueError, match=r"stopped after round 3.*raise train.patience"):
        look_up(str(folder))
    test_resume.resume(folder, InProcessGrid(2), "train.patience=0 output.model=last")
    assert max(rounds_of(folder)) == 5
    again = json.loads((folder / "summary.json").read_text())
    assert "stopped_early" not in again
    assert again["model_round"] == 5


@pytest.mark.parametrize(
    ("round", "message"), [pytest.param(2, "train", marks=pytest.mark.slow), (2, "evaluate")]
)
def test_a_killed_run_ends_in_the_same_round_with_the_same_model(
    round: int, message: str, tmp_path: Path
) -> None:
    config = configured(tmp_path, STRANGE)
    smooth = test_resume.run(config, InProcessGrid(2))

    broken = test_resume.run(config, test_resume.killing(InProcessGrid(2), round, message))
    test_resume.resume(broken, InProcessGrid(2))

    test_resume.assert_equal_runs(broken, smooth)
    one, other = (rounds_of(folder) for folder in (broken, smooth))
    assert {n: r["central"] for n, r in one.items()} == {n: r["central"] for n, r in other.items()}


def test_a_run_killed_when_it_had_ended_only_saves_its_model(tmp_path: Path) -> None:
    config, grid = configured(tmp_path, STRANGE), InProcessGrid(2)
    folder = test_resume.run(config, InProcessGrid(2))
    saved = test_resume.weights(folder)
    (folder / "summary.json").unlink()
    (folder / "model" / "model.safetensors").unlink()

    test_resume.resume(folder, grid)

    assert not [m for m in grid.seen if m.metadata.message_type != "query"]
    again = test_resume.weights(folder)
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.items())


def test_a_best_round_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)

    folder = test_resume.run(configured(tmp_path, STRANGE), InProcessGrid(2))

    assert "output.model=best is round 1, and cannot be saved" in caplog.text
    assert json.loads((folder / "summary.json").read_text())["model_round"] == 3


def test_a_file_that_the_server_cannot_read_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    config = test_resume.configured(tmp_path, f"data.central_path={tmp_path / 'none.jsonl'}")
    grid = InProcessGrid(2)

    with pytest.raises(ValueError, match=r"data.central_path.* no data at .*none.jsonl"):
        test_resume.run(config, grid)
    assert not grid.seen


def test_the_server_evaluates_the_model_as_clients_use_it(tmp_path: Path) -> None:
    """With the defence: by this loss the best round is chosen."""
    losses = []
    for clip in ("", "1e-3", "1e6"):
        defence = f"privacy.defence=gaussian privacy.clip={clip}" if clip else ""
        config = resolve_model(configured(tmp_path, defence))
        trunk = build_trunk(config)
        engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=config.train)
        central = evaluates_centrally(config, engine)
        assert central is not None
        told = central(ArrayRecord())
        assert told is not None
        losses.append(told["loss"])
    assert losses[0] == losses[2] != losses[1]
