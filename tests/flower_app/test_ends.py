"""Ends that never leave their client: personalised federated learning, against plain PyTorch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.schema import Config
from flower_app.build import resolve_model
from models import build_scratch
from simulations.equality.reference import train_whole
from strategies.aggregate.means import weighted_mean
from tests.flower_app import test_app
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.runs import test_resume
from tests.flower_app.test_app import site_steps
from tests.strategies.helpers import largest_difference

UNTIED = "model.scratch.tie_word_embeddings=false"
EXACT = "train.lr=0.01 train.warmup=0 train.local_steps=0 data.max_examples=0"


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where clients keep their own ends."""
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sites"


class Watched(InProcessGrid):
    """Keeps what clients answer, too."""

    def _deliver(self, message: Message) -> Message | None:
        reply = super()._deliver(message)
        if reply is not None:
            self.seen.append(reply)
        return reply


def grid_of(tmp_path: Path, clients: int = 3, kind: type[InProcessGrid] = Watched) -> Any:
    """Clients with a file of unlike size each."""
    lines = (tmp_path / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    grid = kind(clients)
    for number in range(clients):
        own = tmp_path / f"{number}.jsonl"
        own.write_text("\n".join(lines[3 * number : 4 * number + 1]), encoding="utf-8")
        grid.node_configs[number] = {"data-path": str(own), "name": f"site-{number}"}
    return grid


def is_common(name: str, ends: str) -> bool:
    """Whether a weight of the four blocks, cut at 1 and 1, is averaged."""
    block = name.split(".")[2] if name.startswith("model.layers.") else ""
    if ends == "local":
        return block in ("1", "2")
    return block in ("0", "1", "2") or "embed_tokens" in name


def fed_per(config: Config, grid: InProcessGrid) -> list[PreTrainedModel]:
    """FedPer (Arivazhagan et al. 2019, arXiv:1912.00818) on unsplit models: all rounds."""
    models = [build_scratch(config.model.scratch, config.seed) for _ in range(grid.clients)]
    for round in range(1, config.train.rounds + 1):
        tokens = []
        for number, model in enumerate(models):
            path = str(grid.node_configs[number]["data-path"])
            steps = site_steps(config, path, f"site-{number}", round)
            tokens.append(train_whole(model, steps, config.train, round, config.train.rounds)[1])
        states = [dict(model.named_parameters()) for model in models]
        common = [n for n in states[0] if is_common(n, config.aggregation.ends)]
        mean = weighted_mean([{n: s[n].detach() for n in common} for s in states], tokens)
        with torch.no_grad():
            for state, name in itertools.product(states, common):
                state[name].copy_(mean[name])
    return models


def arrays_in(messages: list[Message]) -> set[str]:
    """Names of all tensors that travelled in Flower's messages, either way."""
    records = [r for m in messages if m.has_content() for r in m.content.array_records.values()]
    return {name for record in records for name in record}


def names_on_disk(folder: Path) -> set[str]:
    """Names of all tensors in files under a folder."""
    found: set[str] = set()
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("transport", ["stream", "messages"])
@pytest.mark.parametrize("ends", ["local", "local-top"])
def test_each_site_has_the_model_that_fedper_of_unsplit_models_gives_it(
    ends: str, transport: str, tmp_path: Path, sites: Path
) -> None:
    """Three clients of unequal size, three rounds; the server is never told what stays."""
    config = test_app.tiny_config(
        tmp_path,
        f"{EXACT} {UNTIED} train.rounds=3 aggregation.ends={ends} output.share_trunk=true "
        f"link.transport={transport}",
    )
    grid = grid_of(tmp_path)

    folder, _, _ = test_app.run(config, grid)

    expected = fed_per(config, grid)
    (run,) = sites.iterdir()
    for number, model in enumerate(expected):
        saved = AutoModelForCausalLM.from_pretrained(run / f"site-{number}" / "model")
        assert largest_difference(saved, model) < 1e-4
    apart = dict(expected[0].named_parameters()), dict(expected[1].named_parameters())
    assert (apart[0]["lm_head.weight"] - apart[1]["lm_head.weight"]).abs().max() > 1e-2
    every = {name for name, _ in expected[0].named_parameters()}
    stays = {name for name in every if not is_common(name, ends)}
    assert stays
    assert not arrays_in(grid.seen) & stays
    assert not {n.split("/")[-1] for n in names_on_disk(folder)} & stays
    assert not (folder / "model").exists()
    assert load_file(folder / "common.safetensors").keys() == every - stays
