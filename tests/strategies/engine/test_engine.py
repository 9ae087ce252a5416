"""The engine's order of work: what it refuses, repeats, and keeps apart."""

from __future__ import annotations

import threading

import pytest
import torch

from conf.schema import TrainConfig
from models import split
from simulations.equality.fold import fold
from strategies.engine.bench import Bench
from strategies.engine.engine import MAX_GRAPHS, TrunkEngine
from strategies.engine.session import Session
from strategies.errors import TrunkError
from tests.strategies.helpers import CUT, HIDDEN, H, engine_for, tiny_model


def make_engine(*, max_in_flight: int = 2**32, **train: object) -> TrunkEngine:
    trunk = split(tiny_model(), CUT).trunk
    return engine_for(
        trunk,
        TrainConfig(**{"optimizer": "sgd", "lr": 0.1, "accumulate": 20, **train}),
        timeout=0.3,
        max_in_flight=max_in_flight,
    )  # type: ignore[arg-type]


def open_one(engine: TrunkEngine, key: str = "a", *, steps: int = 3) -> Session:
    if engine._round is None:
        engine.open_round(1, 1, training=True)
    return engine.open(key, client=key, steps=steps)


def step(session: Session, number: int, h: torch.Tensor = H) -> None:
    session.compute(number, 0, h, None)
    session.backward(number, 0, torch.ones_like(h), last=True)
    session.apply(number, client_square_norm=0.0, tokens=8)


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda s: s.compute(1, 0, H, None), "step 1 came, step 0 was due"),
        (lambda s: s.backward(0, 0, H, last=True), "no forward to go back through"),
        (lambda s: s.apply(0, client_square_norm=0.0, tokens=1), "not had its last backward"),
        (lambda s: s.compute(0, 0, H[..., :7], None), r"\(2, 5, 7\); the trunk takes"),
        (lambda s: s.compute(0, 0, H[0], None), "the trunk takes"),
        (lambda s: s.compute(0, 0, H.long(), None), "floating point"),
        (lambda s: s.compute(0, 0, H, torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
    ],
)
def test_what_is_out_of_order_or_shape_is_refused(call, word: str) -> None:  # type: ignore[no-untyped-def]
    session = open_one(make_engine())

    with pytest.raises(TrunkError, match=word):
        call(session)

    step(session, 0)  # and nothing is lost


def test_what_comes_again_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 17, as the session sees it: replies are kept by who sends them, and work is done once."""
    runs = []
    forward = Bench.forward
    monkeypatch.setattr(Bench, "forward", lambda self, *a: runs.append(1) or forward(self, *a))
    engine = make_engine()
    session, twin = open_one(engine, "a"), open_one(engine, "b")
    step(twin, 0)
    runs.clear()
    ones = torch.ones_like(H)
    frames = (
        lambda: session.compute(0, 0, H, None),
        lambda: session.backward(0, 0, ones, last=True),
        lambda: session.apply(0, client_square_norm=0.0, tokens=8),
    )
    for number, send in enumerate(frames):
        send()
        before = weights(session._lane.module)
        for again in frames[: number + 1]:
            with pytest.raises(TrunkError, match="came before|has gone back|came again"):
                again()
        assert torch.equal(weights(session._lane.module), before)

    assert runs == [1]
    assert (session.applied, session.tokens) == (1, 8)
    assert torch.equal(weights(session._lane.module), weights(twin._lane.module))
    step(session, 1)
    assert session.applied == 2


def test_bytes_in_flight_are_bounded_and_given_back() -> None:
    engine = make_engine(max_in_flight=3 * H.nbytes)
    one, other = open_one(engine, "a"), open_one(engine, "b")
    one.compute(0, 0, H, None)
    one.compute(0, 1, H, None)
    other.compute(0, 0, H, None)
    with pytest.raises(TrunkError, match=r"exceed link.max_in_flight_mb=.*; raise it") as busy:
        other.compute(0, 1, H, None)
    assert busy.value.kind == "busy"
    for micro in (0, 1):
        one.backward(0, micro, torch.ones_like(H), last=micro == 1)
    one.apply(0, client_square_norm=0.0, tokens=8)
    assert engine.in_flight.bytes == H.nbytes
    other.compute(0, 1, H, None)
    other.close()
    assert engine.in_flight.bytes == 0


def test_the_last_backward_must_be_the_last() -> None:
    session = open_one(make_engine())
    session.compute(0, 0, H, None)
    session.compute(0, 1, H, None)

    with pytest.raises(TrunkError, match="still wait for their backward"):
        session.backward(0, 0, H, last=True)


def test_graphs_in_flight_are_bounded() -> None:
    session = open_one(make_engine())
    for micro in range(MAX_GRAPHS):
        session.compute(0, micro, H, None)

    with pytest.raises(TrunkError, match="at most"):
        session.compute(0, MAX_GRAPHS, H, None)


def test_steps_are_bounded_by_what_was_announced() -> None:
    session = open_one(make_engine(), steps=1)
    step(session, 0)

    with pytest.raises(TrunkError, match="exceeds the 1 announced"):
        session.compute(1, 0, H, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    engine = make_engine()
    session = open_one(engine)
    before = weights(session._lane.module)
    with pytest.raises(TrunkError, match="activations of step 0 holds values that are not finite"):
        session.compute(0, 0, torch.full_like(H, bad), None)
    session.compute(0, 0, H, None)
    with pytest.raises(TrunkError, match="gradient of step 0 holds values that are not finite"):
        session.backward(0, 0, torch.full_like(H, bad), last=True)
    session.backward(0, 0, H, last=True)
    with pytest.raises(TrunkError, match="norm of step 0 is|a square norm cannot be"):
        session.apply(0, client_square_norm=bad, tokens=1)

    assert torch.equal(weights(session._lane.module), before)


def test_evaluation_neither_trains_nor_keeps_graphs() -> None:
    engine = make_engine()
    engine.open_round(0, 1, training=False)
    session = engine.open("a")

    out = session.compute(0, 0, H, None)

    assert not out.requires_grad
    assert not session._pending
    with pytest.raises(TrunkError, match="evaluates"):
        session.backward(0, 0, out, last=True)


def test_a_session_cannot_be_opened_outside_a_round_or_twice() -> None:
    engine = make_engine()
    with pytest.raises(TrunkError, match="no round is open"):
        engine.open("a", steps=1)
    session = open_one(engine)
    with pytest.raises(TrunkError, match="serves once"):
        engine.open("a", steps=1)
    with pytest.raises(TrunkError, match="at least 1 step"):
        engine.open("b", steps=0)
    engine.close_round()
    with pytest.raises(TrunkError, match="its round has ended"):
        session.compute(0, 0, H, None)


def test_a_replica_that_is_not_named_leaves_no_trace() -> None:
    """A client that dropped out must not move the trunk."""
    engine = make_engine()
    start = weights(engine.trunk)
    step(open_one(engine, "stays"), 0)
    step(open_one(engine, "drops"), 0, H * 3)
    alone = weights(engine._sessions["stays"]._lane.module)

    fold(engine, {"stays": 10.0})

    assert torch.equal(weights(engine.trunk), alone)
    assert not torch.equal(weights(engine.trunk), start)


def test_frozen_weights_are_shared_by_replicas_and_trained_ones_are_not() -> None:
    engine = make_engine()
    frozen = next(engine.trunk.parameters()).requires_grad_(False)

    lane = open_one(engine)._lane

    own, shared = dict(lane.module.named_parameters()), dict(engine.trunk.named_parameters())
    same = [name for name in own if own[name].data_ptr() == shared[name].data_ptr()]
    assert [id(shared[name]) for name in same] == [id(frozen)]


def test_v2_moves_one_trunk_by_turns() -> None:
    engine = make_engine(strategy="splitfed-v2")
    start = weights(engine.trunk)
    first, second = open_one(engine, "first"), open_one(engine, "second")
    first.compute(0, 0, H, None)

    with pytest.raises(TrunkError, match="another client holds it"):
        second.compute(0, 0, H, None)

    first.backward(0, 0, torch.ones_like(H), last=True)
    first.apply(0, client_square_norm=0.0, tokens=1)
    moved = weights(engine.trunk)
    assert not torch.equal(moved, start)
    step(second, 0)
    assert not torch.equal(weights(engine.trunk), moved)


def test_v2_equals_one_optimizer_over_interleaved_steps() -> None:
    engine = make_engine(strategy="splitfed-v2", optimizer="adamw", lr=1e-2)
    plain = make_engine(optimizer="adamw", lr=1e-2)
    batches = [torch.randn(2, 4 + i, HIDDEN) for i in range(4)]
    sessions = [open_one(engine, "a", steps=2), open_one(engine, "b", steps=2)]
    for i, batch in enumerate(batches):
        step(sessions[i % 2], i // 2, batch)

    alone = open_one(plain, "all", steps=4)
    for i, batch in enumerate(batches):
        step(alone, i, batch)

    assert torch.allclose(weights(engine.trunk), weights(alone._lane.module), atol=1e-7)


def test_v2_a_client_that_leaves_in_its_turn_gives_it_back_and_leaves_no_gradient() -> None:
    engine = make_engine(strategy="splitfed-v2")
    leaver, other = open_one(engine, "leaver"), open_one(engine, "other")
    reference = make_engine()
    step(alone := open_one(reference, "other"), 0)
    leaver.compute(0, 0, H * 5, None)
    leaver.compute(0, 1, H * 5, None)
    leaver.backward(0, 0, torch.ones_like(H), last=False)

    waiting = threading.Thread(target=step, args=(other, 0))
    waiting.start()
    leaver.close()
    waiting.join(5)

    assert other.applied == 1
    assert torch.allclose(weights(engine.trunk), weights(alone._lane.module), atol=1e-7)


def test_dropout_repeats_for_the_same_client_and_step_only() -> None:
    def outputs(client: str) -> list[torch.Tensor]:
        trunk = split(tiny_model("gpt2", resid_pdrop=0.5), CUT).trunk
        engine = engine_for(trunk, TrainConfig(accumulate=2), seed=1)
        engine.open_round(1, 1, training=True)
        session = engine.open(client, client=client, steps=1)
        torch.rand(7)  # another session's draws must not matter
        return [session.compute(0, micro, H, None) for micro in range(2)]

    one, two, other = outputs("one"), outputs("one"), outputs("other")

    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("rate", ["attn_pdrop", "resid_pdrop"])
def test_dropout_is_on_in_training_and_off_in_evaluation(rate: str) -> None:
    trunk = split(tiny_model("gpt2", **{rate: 0.5}), CUT).trunk
    engine = engine_for(trunk, TrainConfig(accumulate=2))
    results = {}
    for training in (True, False):
        engine.open_round(1, 1, training=training)
        session = engine.open("a", client="a", steps=1)
        results[training] = [session.compute(0, micro, H, None) for micro in range(2)]
        engine.close_round()

    assert not torch.equal(*results[True])
    assert torch.equal(*results[False])
