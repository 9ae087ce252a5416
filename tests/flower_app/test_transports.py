"""Invariant 4: both transports give the same numbers, through both apps, for every policy."""

from __future__ import annotations

import hmac
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from transformers import AutoModelForCausalLM

from conf.schema import Config
from flower_app.build import build_client
from flower_app.client.messaged import PROGRESS, TENSORS
from flower_app.client.site import Site
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.test_app import run, tiny_config
from tests.strategies.helpers import largest_difference

MESSAGES = "link.transport=messages"
TOLERANCE = 2e-6
"""fp32. The messages' bottom is computed twice, and tied weights collect top's gradient first."""


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    # Clients of a run have processes of their own; here they share torch's generator.
    one_at_a_time = threading.Lock()

    def build(config: Config) -> Any:
        with one_at_a_time:
            return build_client(config)

    monkeypatch.setattr("flower_app.client.site.build_client", build)


def step_losses(metrics: list[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    found = {
        (m["round"], m["client"], m["step"]): m["loss"] for m in metrics if m["kind"] == "step"
    }
    held = {(m["round"],): m["evaluate"]["loss"] for m in metrics if m["kind"] == "round"}
    return {**found, **held}


def together(clients: int) -> dict[int, threading.Event]:
    """All clients train at once, as `merged` needs it over the stream."""
    events = {number: threading.Event() for number in range(clients)}
    for event in events.values():
        event.set()
    return events


def both(
    config: Callable[[str], Config], clients: int, *, at_once: bool = False
) -> tuple[float, float, InProcessGrid]:
    """Largest differences of weights and of losses between the transports."""
    models, curves = [], []
    for transport in ("link.transport=stream", MESSAGES):
        grid = InProcessGrid(clients=clients)
        if at_once and transport != MESSAGES:
            grid.held = together(clients)
        folder, metrics, _ = run(config(transport), grid)
        models.append(AutoModelForCausalLM.from_pretrained(folder / "model"))
        curves.append(step_losses(metrics))
    assert curves[0].keys() == curves[1].keys()
    assert len(curves[0]) > 6
    gap = max(abs(curves[0][key] - curves[1][key]) for key in curves[0])
    return largest_difference(*models), gap, grid


CHANGES = {
    "v1": "train.strategy=splitfed-v1",
    "v1-prox": "train.accumulate=2 train.prox=0.1",
    "v1-lora": "tuning.bottom=lora tuning.trunk=lora tuning.top=lora train.lr=0.02",
    "v1-lora-exact": "tuning.bottom=lora tuning.trunk=lora tuning.top=lora train.lr=0.02 "
    "aggregation.lora=exact",
    "v1-sgd": "train.optimizer=sgd train.momentum=0.9 train.lr=0.05",
    "v1-frozen": "tuning.bottom=frozen train.accumulate=2",
    "v1-klt": "link.codec=klt train.accumulate=2",
    "v1-fedadam": "aggregation.optimizer=fedadam aggregation.lr=0.01",
    "merged": "train.strategy=merged",
    "merged-common": "train.strategy=merged train.sync=step train.accumulate=2",
    "merged-drawn-prox": "train.strategy=merged train.global_batch=7 train.prox=0.2",
    "many": "train.accumulate=9 train.batch_size=1",
    "merged-drawn": "train.strategy=merged train.sync=step train.global_batch=9",
}


FAST = ("v1-lora-exact", "v1-klt", "v1-fedadam", "merged-common", "merged-drawn-prox", "many")
"""What between them goes every way that there is; the others are slow tests."""
PARAMS = [
    pytest.param(changes, id=name, marks=[] if name in FAST else pytest.mark.slow)
    for name, changes in CHANGES.items()
]


@pytest.mark.parametrize("changes", PARAMS)
def test_both_transports_give_the_same_numbers(changes: str, tmp_path: Path) -> None:
    def config(transport: str) -> Config:
        return tiny_config(tmp_path, f"{changes} {transport}")

    weights, losses, grid = both(config, 3, at_once="merged" in changes)

    assert weights < TOLERANCE * 10
    assert losses < TOLERANCE * 5
    for state in grid.states.values():  # nothing is left behind to grow with the rounds
        assert not {TENSORS, PROGRESS} & set(state)


@pytest.mark.parametrize("changes", ["", "train.accumulate=2 tuning.bottom=frozen"])
def test_noise_is_the_same(changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one secret at each node for both, which nodes of a run draw by themselves."""

    def secret(site: Site, purpose: bytes) -> bytes:
        assert f" {site.asked.round} ".encode() in purpose, "evaluations know no round themselves"
        return hmac.digest(site.place.client.encode(), f"{site.asked.round}".encode(), "sha256")

    monkeypatch.setattr(Site, "_secret", secret)
    noise = (
        "privacy.defence=gaussian privacy.clip=1 privacy.noise=0.1 privacy.clip_gradient=1e-3 "
        "privacy.noise_gradient=0.1"
    )

    def config(transport: str) -> Config:
        return tiny_config(tmp_path, f"{noise} {changes} {transport}")

    weights, losses, _ = both(config, 2)

    assert weights < TOLERANCE * 10
    assert losses < TOLERANCE * 5


def test_dropout_draws_the_same(tmp_path: Path) -> None:
    """One client: in this process, unlike in a run, two would share torch's generator."""

    def config(transport: str) -> Config:
        changes = "model.scratch.attention_dropout=0.2 train.accumulate=2 federation.min_clients=1"
        return tiny_config(tmp_path, f"{changes} {transport}")

    weights, losses, _ = both(config, 1)

    assert weights < TOLERANCE * 10
    assert losses < TOLERANCE * 5


def test_splitfed_v2_too_where_turns_have_one_order(tmp_path: Path) -> None:
    """A cohort of one: its trunk and optimizer go from round to round and client to client."""

    def config(transport: str) -> Config:
        changes = "train.strategy=splitfed-v2 federation.min_clients=1 train.rounds=4"
        return tiny_config(tmp_path, f"{changes} federation.fraction_train=0.3 {transport}")

    weights, losses, _ = both(config, 3)

    assert weights < TOLERANCE * 10
    assert losses < TOLERANCE * 5


def test_splitfed_v2_takes_turns_over_messages(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, f"train.strategy=splitfed-v2 train.lr=0.01 {MESSAGES}")

    _, metrics, _ = run(config, InProcessGrid(clients=3))

    order = [m["client"] for m in metrics if m["kind"] == "step" and m["round"] == 1]
    assert sorted(order) == sorted([f"client-{i}" for i in range(3)] * 3)
    assert len(set(order[:3])) == 3, "step by step, not client by client"


@pytest.mark.parametrize(("changes", "each"), [("", 2), ("train.accumulate=3", 2)])
def test_a_step_takes_two_messages(changes: str, each: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, f"train.rounds=1 train.local_steps=4 {MESSAGES} {changes}")
    grid = InProcessGrid(clients=2)

    run(config, grid)

    training = [m for m in grid.seen if m.metadata.message_type == "train"]
    assert len(training) == 2 * (each * 4 + 2)


def test_messages_open_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a port was opened")

    monkeypatch.setattr("grpc.server", refuse)

    _, metrics, _ = run(tiny_config(tmp_path, MESSAGES), InProcessGrid(clients=2))

    assert metrics[-1]["clients"] == ["client-0", "client-1"]


class Watching(InProcessGrid):
    """Counts training messages to each node, and does something at one of them."""

    at: tuple[int, int, Callable[[int], None]] = (-1, -1, lambda node: None)

    def _deliver(self, message: Message) -> Message | None:
        number = self._number(message)
        if message.metadata.message_type == "train":
            counts = self.__dict__.setdefault("counts", {})
            counts[number] = counts.get(number, 0) + 1
            if (number, counts[number]) == self.at[:2]:
                self.at[2](number)
        return super()._deliver(message)


@pytest.mark.parametrize("strategy", ["splitfed-v1", "splitfed-v2", "merged"])
def test_a_client_that_dies_in_mid_round_holds_nobody_up(strategy: str, tmp_path: Path) -> None:
    grid = Watching(clients=3)
    grid.at = (1, 4, lambda node: grid.broken.add(node))
    config = tiny_config(
        tmp_path, f"train.strategy={strategy} {MESSAGES} federation.round_timeout=60"
    )

    _, metrics, _ = run(config, grid)

    rounds = {m["round"]: m for m in metrics if m["kind"] == "round"}
    assert rounds[1]["clients"] == ["client-0", "client-2"]
    assert "the process was killed" in rounds[1]["missing"]["client-1"]


def test_a_node_that_lost_its_state_says_so(tmp_path: Path) -> None:
    grid = Watching(clients=2)
    grid.at = (1, 3, lambda node: grid.states.__setitem__(node, RecordDict()))

    _, metrics, _ = run(tiny_config(tmp_path, f"train.rounds=1 {MESSAGES}"), grid)

    assert "no state of session train-1" in metrics[-1]["missing"]["client-1"]
    assert metrics[-1]["clients"] == ["client-0"]


def test_a_silent_client_ends_with_the_round(tmp_path: Path) -> None:
    grid = Watching(clients=2)
    grid.at = (1, 3, lambda node: grid.absent.add(node))
    config = tiny_config(
        tmp_path, f"train.rounds=1 {MESSAGES} federation.round_timeout=8 data.heldout=0"
    )

    _, metrics, _ = run(config, grid)

    assert "no answer within" in metrics[-1]["missing"]["client-1"]


@pytest.mark.parametrize("strategy", ["splitfed-v2", "merged"])
def test_a_silent_client_costs_only_itself(strategy: str, tmp_path: Path) -> None:
    grid = Watching(clients=3)
    grid.at = (1, 4, lambda node: grid.absent.add(node))
    changes = f"train.strategy={strategy} train.rounds=1 {MESSAGES} link.timeout=4 data.heldout=0"

    _, metrics, _ = run(tiny_config(tmp_path, changes), grid)

    assert metrics[-1]["clients"] == ["client-0", "client-2"]
    assert "no answer within link.timeout=4 s" in metrics[-1]["missing"]["client-1"]


def test_what_the_server_refuses_reaches_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = InProcessGrid(clients=2)
    deliver = grid._deliver

    def garbled(message: Message) -> Message | None:
        reply = deliver(message)
        if reply and "frames" in reply.content.config_records and grid._number(message) == 1:
            reply.content.config_records["frames"]["frames"] = [b"\x99nonsense"]
        return reply

    monkeypatch.setattr(grid, "_deliver", garbled)

    _, metrics, _ = run(tiny_config(tmp_path, f"train.rounds=1 {MESSAGES}"), grid)

    assert "did not arrive as it was sent" in metrics[-1]["missing"]["client-1"]


def test_nothing_of_a_client_but_frames_parts_and_counters_is_in_its_replies(
    tmp_path: Path,
) -> None:
    """Row 32: neither ids nor labels, nor the texts."""
    replies = []
    grid = InProcessGrid(clients=2)
    deliver = grid._deliver
    grid._deliver = lambda message: replies.append(deliver(message)) or replies[-1]  # type: ignore[method-assign]

    run(tiny_config(tmp_path, MESSAGES), grid)

    assert len(replies) > 20
    for reply in replies:
        assert set(reply.content) <= {"outcome", "metrics", "arrays", "frames", "profile"}
        if "frames" in reply.content.config_records:
            assert set(reply.content.config_records["frames"]) == {"frames", "steps"}


def test_metrics_count_the_frames(tmp_path: Path) -> None:
    _, metrics, _ = run(tiny_config(tmp_path, MESSAGES), InProcessGrid(clients=2))

    first = next(m for m in metrics if m["kind"] == "step")
    assert first["bytes_up"] > 4 * 16 * 32 * 4
    assert first["seconds"]["bottom"] > 0
    assert json.dumps(metrics)


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_later_rounds_cross_for_less_with_a_cache(tmp_path: Path, codec: str) -> None:
    """Through both apps: what a node keeps outlives its messages, evaluation does not disturb it,
    and in fp32 no number changes."""
    found, losses = {}, {}
    for cache_mb in (0, 8):
        config = tiny_config(
            tmp_path,
            "tuning.bottom=frozen tuning.top=frozen train.rounds=3 train.local_steps=0 "
            f"train.local_epochs=1 link.codec={codec} link.cache_mb={cache_mb}",
        )
        _, metrics, _ = run(config, InProcessGrid())
        rounds = [m for m in metrics if m["kind"] == "round" and m["round"] > 0]
        found[cache_mb] = [m["bytes_up"] for m in rounds]
        losses[cache_mb] = step_losses(metrics)
    assert found[8][1] < 0.8 * found[0][1]
    assert found[8][0] < 1.1 * found[0][0]
    if codec == "fp32":
        gap = max(abs(losses[0][key] - losses[8][key]) for key in losses[0])
        assert gap < 1e-5  # in other company padding is longer, and rounds elsewhere
