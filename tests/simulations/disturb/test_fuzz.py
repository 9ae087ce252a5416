"""The fuzzer finds nothing in what there is, and finds what is broken on purpose."""

from __future__ import annotations

import math

import pytest
import torch

from simulations.disturb.fuzz import fuzz
from strategies.engine.checks import check_finite
from strategies.transport import conversation
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.codec import Codec
from strategies.transport.payload import Payload

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_thousand_inputs() -> None:
    result = fuzz(2000)

    assert result["crashes"] == []
    assert result["inputs"] == 2000
    assert sum(result["answered"].values()) + sum(result["refused"].values()) == 2000
    for reached in ("activations", "gradients", "applied", "closed", "generated"):
        assert result["answered"][reached] > 0
    for kind in ("damaged", "shape", "codec", "order", "version", "not-finite", "closed", "gone"):
        assert result["refused"][kind] > 0
    assert result["targets"]["generation"] > 0
    assert len(result["targets"]) >= 10  # of 11: which are drawn is chance


def test_a_seed_and_a_number_bring_an_input_back() -> None:
    counts = [{**fuzz(60, seed=3), "seconds": 0} for _ in range(2)]
    assert counts[0]["answered"] == counts[1]["answered"]
    assert counts[0]["refused"] == counts[1]["refused"]
    assert fuzz(60, seed=3, only=45)["inputs"] == 20


@pytest.mark.slow
def test_a_hundred_thousand_inputs() -> None:
    assert fuzz(100_000, seed=1)["crashes"] == []


def _trusting(
    codec: Codec, message: pb.Tensor, mask_BT: object, payload: Payload, what: str
) -> torch.Tensor:
    """A decoder that believes what it is told."""
    data = bytearray(payload.of(message, what))
    return torch.frombuffer(data, dtype=torch.float32).reshape(tuple(message.shape))


SABOTAGE = {
    "what is not finite is let in": (
        "strategies.engine.session.check_bounded", lambda tensor, what: None, "not finite"
    ),
    "huge numbers meet others": (
        "strategies.engine.session.check_bounded", check_finite, "was let in"
    ),
    "shapes are not checked": (
        "strategies.engine.bench.check_shapes",
        lambda *shapes: None,
        "Error",
    ),
    "a decoder believes": ("strategies.transport.codec.codec.Codec.decode", _trusting, "Error"),
    "steps are not checked": (
        "strategies.engine.session.Session._check_step", lambda self, step: None, "was due"
    ),
    "nothing is given back": (
        "strategies.engine.checks.InFlight.give_back", lambda self, count: None, "in flight"
    ),
    "refusals quote all": (
        "strategies.errors.LONGEST_MESSAGE", math.inf, "characters"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_fuzzer_sees_a_bug(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, instead, word = SABOTAGE[what]
    monkeypatch.setattr(where, instead)
    crashes = fuzz(6000, seed=2)["crashes"]
    assert any(word in crash["what"] for crash in crashes), crashes

    first = next(crash for crash in crashes if word in crash["what"])
    again = fuzz(6000, seed=2, only=first["input"])["crashes"]
    assert again == [first]


def test_the_fuzzer_sees_memory_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.disturb.fuzz.DEADLINE", 0.0)
    assert "it took" in fuzz(40)["crashes"][0]["what"]
    monkeypatch.setattr("simulations.disturb.fuzz.DEADLINE", 60.0)

    kept: list[bytearray] = []
    answer = conversation.Conversation.answer

    def greedy(self: conversation.Conversation, raw: bytes) -> bytes:
        kept.append(bytearray(b"x" * 2**26))
        return answer(self, raw)

    monkeypatch.setattr(conversation.Conversation, "answer", greedy)
    assert any("MiB" in crash["what"] for crash in fuzz(100)["crashes"])
