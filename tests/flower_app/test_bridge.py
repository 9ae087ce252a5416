"""A bridge is trained beside the federation, and changes nothing of what the federation trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conf.rules import ConfigError
from flower_app.client.node import own_config
from flower_app.runs import checkpoint
from models.bridge import BRIDGE, BRIDGE_FILE, load_bridge, missed_share, take_bridge
from strategies.aggregate.joint import JointModel
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.runs import test_resume
from tests.flower_app.test_app import losses, run, tiny_config

BRIDGED = "train.bridge=24"
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr("flower_app.runs.recorder.plot_loss", lambda folder: None)


def trained(tmp_path: Path, changes: str) -> tuple[Path, Any]:
    folder, metrics, _ = run(tiny_config(tmp_path, changes), InProcessGrid(clients=2))
    return folder, losses(metrics)


@pytest.mark.parametrize(
    "changes",
    [
        "train.accumulate=2 model.scratch.attention_dropout=0.1 federation.min_clients=1",
        pytest.param("link.transport=messages train.strategy=merged", marks=SLOW),
        pytest.param(
            "train.strategy=splitfed-v2 aggregation.optimizer=fedavgm aggregation.lr=0.5",
            marks=SLOW,
        ),
        pytest.param(
            "tuning.bottom=lora tuning.trunk=lora tuning.top=lora aggregation.lora=exact",
            marks=SLOW,
        ),
    ],
    ids=["v1-dropout", "merged-messages", "v2-momentum", "lora-exact"],
)
def test_what_is_trained_is_the_same_to_the_bit_without_a_bridge(
    changes: str, tmp_path: Path
) -> None:
    clients = 1 if "dropout" in changes else 2
    plain = run(tiny_config(tmp_path, changes), InProcessGrid(clients=clients))
    bridged = run(tiny_config(tmp_path, f"{changes} {BRIDGED}"), InProcessGrid(clients=clients))

    assert losses(bridged[1]) == losses(plain[1])
    without = load_file(plain[0] / "model" / "model.safetensors")
    model = load_file(bridged[0] / "model" / "model.safetensors")
    assert model.keys() == without.keys()
    assert all(torch.equal(model[name], without[name]) for name in model)
    assert not (plain[0] / "model" / BRIDGE_FILE).exists()
    assert load_bridge(bridged[0] / "model", hidden_size=_size(bridged[0]))
    AutoModelForCausalLM.from_pretrained(bridged[0] / "model")  # nothing odd lies beside it


def test_it_learns_what_the_trunk_does(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path, f"{BRIDGED} train.local_steps=25 train.lr=0.01")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    bridge = load_bridge(folder / "model", hidden_size=model.config.hidden_size)
    ids = torch.tensor([list(b"The import statement searches for the named module")]) + 3

    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        learned = float(missed_share(bridge, states[1], states[-2], None))
        bridge.down.zero_()  # as it was in the beginning
        at_first = float(missed_share(bridge, states[1], states[-2], None))

    assert learned < 0.75 * at_first


def test_both_transports_train_the_same_bridge(tmp_path: Path) -> None:
    changes = f"{BRIDGED} train.accumulate=2"
    streamed, _ = trained(tmp_path, changes)
    messaged, _ = trained(tmp_path, f"{changes} link.transport=messages")

    one, other = (load_file(each / "model" / BRIDGE_FILE) for each in (streamed, messaged))
    assert one.keys() == other.keys() == {"gate", "up", "down"}
    assert one["down"].abs().max() > 1e-4
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bridge(tmp_path: Path) -> None:
    config = test_resume.configured(tmp_path, BRIDGED)
    smooth = test_resume.run(config, InProcessGrid(2))
    broken = test_resume.run(config, test_resume.killing(InProcessGrid(2), 3))
    state = checkpoint.read(broken / "checkpoints" / "round-0002").state["joint"]
    assert any(name.endswith(f"{BRIDGE}down") for name in state)

    test_resume.resume(broken, InProcessGrid(2, first_id=5000))

    for file in (BRIDGE_FILE, "model.safetensors"):
        one, other = (load_file(each / "model" / file) for each in (smooth, broken))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_is_averaged_by_tokens_like_the_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    update = JointModel.update

    def watched(self: JointModel, number: int, contributions: Any) -> Any:
        seen.append((self, contributions))
        return update(self, number, contributions)

    monkeypatch.setattr(JointModel, "update", watched)
    trained(tmp_path, f"{BRIDGED} train.rounds=1")

    joint, contributions = seen[0]
    total = sum(each.weight for each in contributions)
    own, _ = take_bridge(joint.tensors())
    assert len(own) == 3
    for name, tensor in own.items():
        mean = sum(each.weight / total * each.state[name] for each in contributions)
        assert torch.allclose(tensor, mean, atol=1e-6)


def test_what_cannot_be_averaged_is_refused_in_words(tmp_path: Path) -> None:
    for ends in ("local", "local-top"):
        with pytest.raises(ConfigError, match=f"(?s)train.bridge=24.*aggregation.ends={ends}"):
            tiny_config(tmp_path, f"{BRIDGED} aggregation.ends={ends}")
    with pytest.raises(ConfigError, match="train.sync=step"):
        tiny_config(tmp_path, f"{BRIDGED} train.strategy=merged train.sync=step")
    with pytest.raises(ValueError, match="cut-bottom=2.*train.bridge=24"):
        own_config(tiny_config(tmp_path, BRIDGED), {"cut-bottom": 2})


def _size(folder: Path) -> int:
    return int(AutoModelForCausalLM.from_pretrained(folder / "model").config.hidden_size)
