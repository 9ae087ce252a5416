"""Masked ends: all that lies in the memory of a server's process tells nothing of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flower_app.client.site import Site
from flower_app.client.site_key import SiteKey, new_site_key
from models import client_state
from tests.flower_app import test_app
from tests.flower_app.memory import Held, Server, server_apart
from tests.flower_app.test_masked import EXACT, _flower_task, first_ends, grid_of, likeness
from tests.flower_app.traces import Learned, traces, with_means

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc/PID/mem")

__all__ = ["_flower_task"]

CLIENTS = 3
Answers = list[tuple[dict[str, Tensor], int]]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """The true ends of every client and round, and their weights."""
    found: Answers = []
    trained = Site.trained

    def spy(self: Site, bottom: Any, top: Any, tokens: int) -> Any:
        state = {name: t.detach().clone() for name, t in client_state(bottom, top).items()}
        found.append((state, tokens))
        return trained(self, bottom, top, tokens)

    monkeypatch.setattr(Site, "trained", spy)
    return found


def train(
    server: Server, folder: Path, answers: Answers, key: Path | None = None
) -> tuple[list[Held], list[Learned]]:
    """What the server held in two rounds, and what there was to find."""
    answers.clear()
    ends = "masked" if key else "plain"
    config = test_app.tiny_config(
        folder, f"{EXACT} train.rounds=2 privacy.ends={ends} output.checkpoint_every=1"
    )
    held = server.run(config, grid_of(folder, key, CLIENTS))
    assert len(answers) == 2 * CLIENTS
    return held, with_means([answers[:CLIENTS], answers[CLIENTS:]], first_ends(config))


def alike(held: Held, learned: list[Learned]) -> float:
    """Largest correlation of an object's tensor with ends, or with what they learned in all."""
    return likeness(held.arrays, [dict(each.end) for each in learned], dict(learned[0].start))


def test_nothing_in_the_servers_memory_tells_of_the_ends(
    tmp_path: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there with masks of zero, or none, the same search finds in the same process."""
    new_site_key(key := tmp_path / "key")
    with server_apart() as server:
        held, learned = train(server, tmp_path, answers, key)
        assert len(held) == 3
        assert traces(np.concatenate([each.memory for each in held]), learned) == {}
        assert max(alike(each, learned) for each in held) < 0.25

        monkeypatch.setattr(SiteKey, "mask", lambda self, nonce, name, n: np.zeros(n, "<i8"))
        held, learned = train(server, tmp_path, answers, key)
        assert traces(held[1].memory, learned).get("ends, int64", 0) > 1000
        assert alike(held[1], learned) > 0.9

        held, learned = train(server, tmp_path, answers)
        assert {"ends, float32", "ends, float64"} <= traces(held[1].memory, learned).keys()
        assert alike(held[1], learned) > 0.9


def test_traces_are_found_in_every_format_and_at_every_place() -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = ({"w": scale + torch.rand(64, generator=generator)} for scale in (1, 4))
    one = Learned(start, end, 3)
    update = end["w"].double() - start["w"].double()
    noise = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    for what, planted in {
        "ends, float32": end["w"],
        "ends, float64": 3 * end["w"].double(),
        "ends, bfloat16": end["w"].bfloat16(),
        "ends, int64": (3 * end["w"].double() * 2**24).round().long(),
        "update, float16": update.half(),
        "update, float32": (3 * update).float(),
    }.items():
        for place in range(9):
            bytes_of = np.frombuffer(bytes(planted.view(torch.uint8).numpy()), np.uint8)
            memory = np.concatenate([noise[:place], bytes_of, noise])
            assert traces(memory, [one]) == {what: len(bytes_of) // 16}
    assert traces(noise, [one]) == {}
    start_of = np.frombuffer(start["w"].numpy().tobytes(), np.uint8)
    assert traces(start_of, [one]) == {}, "the server knows what the run began with"
