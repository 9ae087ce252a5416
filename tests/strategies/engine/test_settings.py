"""Every setting of the trunk does something, and what a client claims is not simply believed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from conf.schema import TrainConfig
from flower_app.client import streamed
from models import split
from simulations.equality.local_link import LocalLink
from strategies.engine.bench import Bench
from strategies.engine.session import Session
from strategies.errors import TrunkError
from strategies.transport.link import Request
from tests.strategies.helpers import (
    CUT,
    HIDDEN,
    H,
    compute_frame,
    connect,
    engine_for,
    forward,
    largest_difference,
    place,
    random_steps,
    served,
    tiny_model,
    train_split,
    train_whole,
    twin,
)


def open_session(train: TrainConfig, *, family: str = "llama", number: int = 1, **kwargs: Any):  # type: ignore[no-untyped-def]
    model = tiny_model(family, **kwargs.pop("model", {}))
    engine = engine_for(split(model, CUT).trunk, train, **kwargs)
    engine.open_round(number, 2, training=True)
    return engine, engine.open("a", client="a", steps=3)


def gradient_step(session: Session, scale: float = 1.0) -> None:
    session.compute(0, 0, H, None)
    session.backward(0, 0, torch.ones_like(H) * scale, last=True)


def test_the_trunk_has_its_own_learning_rate() -> None:
    train = TrainConfig(lr=1.0, trunk_lr=0.25, schedule="linear")
    _, session = open_session(train, number=2)
    gradient_step(session)

    assert session.apply(0, client_square_norm=0.0, tokens=8).lr == 0.125


@pytest.mark.parametrize("changes", [{"betas": (0.5, 0.6)}, {"eps": 0.1}, {"weight_decay": 0.3}])
def test_settings_of_adamw_reach_all_parts(changes: dict[str, Any]) -> None:
    train = TrainConfig(lr=1e-2, **changes)
    model, steps = tiny_model(), random_steps(3, seed=1)
    whole, default = twin(model), twin(model)

    train_split(model, steps, train)
    train_whole(whole, steps, train)
    train_split(default, steps, TrainConfig(lr=1e-2))

    assert largest_difference(model, whole) < 1e-4
    for part, other in zip(split(model, CUT), split(default, CUT), strict=True):
        assert largest_difference(part, other) > 1e-3


def test_dropout_differs_from_round_to_round_on_both_sides() -> None:
    model, train = {"resid_pdrop": 0.5}, TrainConfig()
    trunk = [
        open_session(train, family="gpt2", number=number, model=model)[1].compute(0, 0, H, None)
        for number in (1, 2)
    ]
    losses = []
    for number in (1, 2):
        parts = split(tiny_model("gpt2"), CUT)
        for module in (*parts.bottom.modules(), *parts.top.modules()):
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        engine = engine_for(parts.trunk, train)
        engine.open_round(1, 1, training=True)
        link = LocalLink(engine.open("a", client="a", steps=1))
        here = place("a", round=number, rounds=2)
        steps = random_steps(1, seed=0)
        outcome = streamed.train(parts.bottom, parts.top, link, steps, 1, train, here)
        losses.append(outcome.losses[0])

    assert not torch.equal(*trunk)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("role", range(3))
def test_bf16_precision_reaches_every_part(role: int) -> None:
    parts = list(split(tiny_model(), CUT))
    seen = set()
    linear = next(m for m in parts[role].modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    train = TrainConfig(precision="bf16")
    engine = engine_for(parts[1], train)
    engine.open_round(1, 1, training=True)
    lane = engine.open("a", client="a", steps=1)
    link = LocalLink(lane)

    streamed.train(parts[0], parts[2], link, random_steps(1, seed=0), 1, train, place("a"))

    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("claim", "word"),
    [
        ({"client_square_norm": -5.0}, "square norm cannot be -5"),
        ({"client_square_norm": float("nan")}, "a square norm cannot be nan"),
        ({"tokens": 2**62}, "reports 4611686018427387904 tokens; its micro-batches held 10"),
        ({"tokens": 0}, "reports 0 tokens"),
    ],
)
def test_claims_that_cannot_be_are_refused(claim: dict[str, Any], word: str) -> None:
    """A negative norm would switch clipping off; tokens are a client's weight in the average."""
    _, session = open_session(TrainConfig(clip=1.0))
    gradient_step(session, 1e6)

    with pytest.raises(TrunkError, match=word):
        session.apply(0, **{"client_square_norm": 0.0, "tokens": 8, **claim})
    assert session.applied == 0


def test_micro_batches_are_bounded_by_accumulate() -> None:
    _, session = open_session(TrainConfig(accumulate=2))
    for micro in range(2):
        session.compute(0, micro, H, None)
        session.backward(0, micro, H, last=False)

    with pytest.raises(TrunkError, match=r"train.accumulate=2 allows 0 to 1"):
        session.compute(0, 2, H, None)


def test_limits_are_checked_before_anything_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    for reader in ("conversation.decode_mask", "codec.codec.Codec.decode"):
        monkeypatch.setattr(
            f"strategies.transport.{reader}", lambda *args: pytest.fail("memory was taken")
        )
    engine, _ = open_session(TrainConfig(), max_sequences=4, max_tokens=16)
    cases = {
        "at most train.batch_size=4 sequences of data.context=16": torch.zeros(2, 17, HIDDEN),
        "at most train.batch_size=4": torch.zeros(5, 5, HIDDEN),
    }
    with served(engine) as service:
        for number, (word, tensor) in enumerate(cases.items()):
            link = connect(service, f"s{number}", 1)
            raw = compute_frame(tensor, mask=bytes(2**13))
            with pytest.raises(TrunkError, match=word):
                link.send(Request(raw, "activations"))
                link.computed()


def test_no_frame_is_read_that_is_larger_than_a_batch_needs() -> None:
    engine, _ = open_session(TrainConfig(), max_sequences=4, max_tokens=16)
    with served(engine) as service:
        link = connect(service, "b", 1)
        assert forward(link, 0, 0, torch.randn(4, 16, HIDDEN), None).shape == (4, 16, HIDDEN)
        with pytest.raises(TrunkError, match="larger than max .* lower train.batch_size"):
            forward(link, 0, 1, torch.randn(40, 16, HIDDEN), None)


def test_a_failing_backward_leaves_no_gradient_on_the_shared_trunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, session = open_session(TrainConfig(strategy="splitfed-v2"))
    backward = torch.autograd.backward

    def half_way(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        raise MemoryError

    session.compute(0, 0, H, None)
    monkeypatch.setattr(torch.autograd, "backward", half_way)
    with pytest.raises(MemoryError):
        session.backward(0, 0, torch.ones_like(H), last=True)
    session.close()

    assert all(p.grad is None for p in engine.trunk.parameters())


def test_the_end_of_a_round_waits_for_a_session_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its late gradients would meet the next round."""
    engine, session = open_session(TrainConfig(strategy="splitfed-v2"))
    forward, started, go_on = Bench.forward, threading.Event(), threading.Event()

    def slow(self: Bench, *args: Any) -> torch.Tensor:
        started.set()
        assert go_on.wait(10)
        return forward(self, *args)

    monkeypatch.setattr(Bench, "forward", slow)
    working = threading.Thread(target=session.compute, args=(0, 0, H, None))
    working.start()
    assert started.wait(10)
    closing = threading.Thread(target=engine.close_round)
    closing.start()
    closing.join(0.2)
    still_waiting = closing.is_alive()
    go_on.set()
    closing.join(10)
    working.join(10)

    assert still_waiting
    assert not session._pending
    assert not engine.policy._turn.held_by(session.member)  # type: ignore[attr-defined]
