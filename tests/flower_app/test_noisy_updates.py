"""Runs whose clients clip and noise their updates: what the server gets, over both transports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file

from conf.load import load_config
from conf.rules import ConfigError
from flower_app.build import build_client
from flower_app.client.masked import reveal
from flower_app.client.site_key import new_site_key, read_site_key
from models import client_state
from strategies.aggregate.masked import take_masked
from tests.flower_app import test_app
from tests.flower_app.grid import InProcessGrid


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


def _node(number: int) -> dict[str, Any]:
    return {"partition-id": number, "num-partitions": 2}


@pytest.mark.parametrize(
    ("transport", "ends", "noise"),
    [
        ("stream", "plain", 0.0),
        ("messages", "plain", 0.0),
        ("stream", "masked", 0.0),
        ("messages", "plain", 1.0),
        ("stream", "masked", 1.0),
    ],
)
def test_the_server_gets_clipped_and_noised_updates(
    transport: str, ends: str, noise: float, tmp_path: Path
) -> None:
    """One round from a known start: the mean is no further from it than the clip; with noise, by
    about the noise's length, each client's being independent."""
    clip, clients = 1e-2, 2
    changes = (
        f"train.rounds=1 train.lr=0.01 train.warmup=0 link.transport={transport} "
        f"privacy.ends={ends} privacy.update_clip={clip} privacy.update_noise={noise}"
    )
    config = test_app.tiny_config(tmp_path, changes)
    grid = InProcessGrid(clients)
    new_site_key(tmp_path / "key")
    if ends == "masked":
        for number in range(clients):
            grid.node_configs[number] = {**_node(number), "site-key": str(tmp_path / "key")}
    folder, metrics, _ = test_app.run(config, grid)
    start = client_state(*build_client(config))
    if ends == "masked":
        masked, _ = take_masked(load_file(folder / "masked.safetensors"))
        assert masked is not None
        end = reveal(masked, read_site_key(tmp_path / "key"))
    else:
        end = load_file(next((folder / "model").glob("*model.safetensors")))
    moved = torch.cat([(end[name] - start[name]).flatten() for name in start]).double()
    length = float(moved.norm())
    if noise:
        due = noise * clip * (moved.numel() / clients) ** 0.5
        assert length == pytest.approx(due, rel=0.1)
        record = next(r for r in metrics if r["kind"] == "round" and r["round"] == 1)
        assert record["epsilon"]["updates"] > 0
    else:
        assert 0.5 * clip < length <= clip * 1.001


def test_a_site_that_insists_is_not_in_a_weaker_run(tmp_path: Path) -> None:
    """And says why."""
    grid = InProcessGrid(2)
    grid.node_configs[1] = {**_node(1), "privacy-require": "update_clip=1 update_noise=1"}
    config = test_app.tiny_config(tmp_path, "train.rounds=1 federation.min_clients=1")
    _, metrics, _ = test_app.run(config, grid)
    record = next(r for r in metrics if r["kind"] == "round" and r["round"] == 1)
    assert record["clients"] == ["client-0"]


@pytest.mark.parametrize(
    "change",
    [
        "train.sync=step train.strategy=merged",
        "train.bridge=8",
        "aggregation.ends=local",
        "privacy.update_clip=0",
    ],
)
def test_what_does_not_go_together_is_refused(change: str) -> None:
    with pytest.raises(ConfigError, match="privacy.update_"):
        load_config("demo", ["privacy.update_clip=1", "privacy.update_noise=1", *change.split()])
