"""One client that lies costs itself the round and nobody else the run.

The clients are the real ClientApp; the hostile one's replies are changed on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message, MetricRecord
from flwr.supercore.task_identity import TaskIdentity

from strategies.records import from_arrays, to_arrays
from tests.flower_app import test_app
from tests.flower_app.grid import InProcessGrid

FAST = "train.rounds=1 train.local_steps=2 data.heldout=0.2 link.grace=0.2 output.save_model=false"
LORA = "tuning.bottom=lora tuning.trunk=lora tuning.top=lora"
Change = Callable[[Message], None]


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def run(
    tmp_path: Path, changes: str, kind: str, change: Change, hostile: int = 1
) -> list[dict[str, Any]]:
    """The records of all rounds, `change` having been made to the hostile replies of a kind."""
    grid = InProcessGrid(clients=3)
    deliver = grid._deliver

    def tampered(message: Message) -> Message | None:
        reply = deliver(message)
        told = (message.metadata.message_type, grid._number(message))
        last = reply is not None and "frames" not in reply.content
        if reply is not None and last and told == (kind, hostile):
            change(reply)
        return reply

    grid._deliver = tampered  # type: ignore[method-assign]
    config = test_app.tiny_config(tmp_path, f"{FAST} {changes}")
    _, metrics, _ = test_app.run(config, grid)
    return [record for record in metrics if record["kind"] == "round"]


def arrays(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """Change the tensors in a reply."""

    def apply(reply: Message) -> None:
        state = from_arrays(reply.content.array_records["arrays"])
        change(state)
        reply.content["arrays"] = to_arrays(state)

    return apply


def wider(state: dict[str, torch.Tensor]) -> None:
    """Factors of a rank that no client has, which make a product all the same."""
    for name in list(state):
        if "lora_A" in name:
            state[name] = torch.ones(1000, state[name].shape[1])
        if "lora_B" in name:
            state[name] = torch.ones(state[name].shape[0], 1000)


def unlike(state: dict[str, torch.Tensor]) -> None:
    """A of one rank, B of another."""
    name = next(name for name in state if "lora_B" in name)
    state[name] = torch.ones(state[name].shape[0], 3)


def nothing(state: dict[str, torch.Tensor]) -> None:
    state.clear()


def stranger(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(32, 16)


def huge(state: dict[str, torch.Tensor]) -> None:
    state[next(iter(state))].fill_(3e38)


def counter(name: str, value: float) -> Change:
    def apply(reply: Message) -> None:
        metrics = dict(reply.content.metric_records["metrics"])
        reply.content["metrics"] = MetricRecord({**metrics, name: value})  # type: ignore[arg-type]

    return apply


def bare(reply: Message) -> None:
    for name in list(reply.content):
        if name != "outcome":
            del reply.content[name]


@pytest.mark.parametrize(
    ("changes", "change", "words"),
    [
        (f"{LORA} aggregation.lora=exact", arrays(wider), "has shape (1000, 16), (8, 16) is due"),
        (f"{LORA} aggregation.lora=svd", arrays(unlike), "3), (16, 8) is due"),
        (f"{LORA} aggregation.lora=svd", arrays(huge), "holds 3e+38"),
        (LORA, arrays(wider), "has shape (1000, 16)"),
        ("", arrays(stranger), "holds 'model.layers.1.mlp.up_proj.weight'"),
        ("", arrays(nothing), "lacks '"),
        ("", counter("num-tokens", 2.0**40), "of training, the trunk has applied"),
        ("", counter("steps", 3), "steps=3 of training, the trunk has applied 2"),
        ("", bare, "no record 'metrics'"),
        ("link.transport=messages", arrays(nothing), "lacks '"),
        ("link.transport=messages", arrays(stranger), "holds 'model.layers.1.mlp"),
    ],
)
def test_a_hostile_answer_to_training_costs_its_client_alone(
    changes: str, change: Change, words: str, tmp_path: Path
) -> None:
    _, last = run(tmp_path, f"{changes} federation.fraction_evaluate=0", "train", change)

    assert last["clients"] == ["client-0", "client-2"]
    assert words in last["missing"]["client-1"]


@pytest.mark.parametrize("changes", ["", "link.transport=messages"])
def test_held_out_tokens_are_those_that_the_trunk_saw(changes: str, tmp_path: Path) -> None:
    """A client's weight in the held-out loss."""
    first, _ = run(tmp_path, changes, "evaluate", counter("num-tokens", 1e9))

    assert first["clients"] == ["client-0", "client-2"]
    assert "reports 1e+09 held-out tokens, the trunk has seen" in first["missing"]["client-1"]


def test_an_odd_answer_does_not_close_an_over_sampled_round(tmp_path: Path) -> None:
    """Two of three are needed. The odd one answers first or second; two honest ones count."""
    changes = "federation.fraction_train=0.67 federation.oversample=0.5 federation.quorum=1"

    _, last = run(tmp_path, changes, "train", arrays(stranger))

    assert last["clients"] == ["client-0", "client-2"]
    assert "holds 'model.layers.1" in last["missing"]["client-1"]


def garbage(reply: Message) -> None:
    array = next(iter(reply.content.array_records["arrays"].values()))
    array.data = b"PK\x03\x04"


@pytest.mark.parametrize("change", [bare, garbage, arrays(wider)])
@pytest.mark.parametrize(
    "changes",
    [
        "aggregation.optimizer=fedadam",
        pytest.param("train.strategy=merged train.sync=step link.transport=messages", id="step"),
    ],
)
def test_first_tensors_that_make_no_sense_are_asked_of_the_next_client(
    changes: str, change: Change, tmp_path: Path
) -> None:
    """The hostile client is the first that is asked."""

    def queried(reply: Message) -> None:
        if "arrays" in reply.content:
            change(reply)

    changes = f"{LORA} {changes} federation.fraction_evaluate=0"
    records = run(tmp_path, changes, "query", queried, hostile=0)

    assert records[-1]["clients"] == ["client-0", "client-1", "client-2"]
    assert records[-1]["missing"] == {}


def test_a_client_refuses_tensors_that_are_not_finite(tmp_path: Path) -> None:
    """What the server sends is checked by each client, too."""
    grid = InProcessGrid(clients=2)

    def poison(message: Message) -> None:
        number = message.content.config_records["ticket"]["round"]
        sent = message.content.array_records["arrays"]
        if (message.metadata.message_type, number, grid._number(message)) == ("train", 2, 1):
            state = from_arrays(sent)
            next(iter(state.values())).fill_(torch.nan)
            message.content["arrays"] = to_arrays(state)

    grid.meanwhile = poison
    config = test_app.tiny_config(tmp_path, f"{FAST} train.rounds=2 federation.fraction_evaluate=0")
    _, metrics, _ = test_app.run(config, grid)

    assert metrics[-1]["clients"] == ["client-0"]
    assert "what the server sent cannot be" in metrics[-1]["missing"]["client-1"]
    assert "not finite" in metrics[-1]["missing"]["client-1"]
