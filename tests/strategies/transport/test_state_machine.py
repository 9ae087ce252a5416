"""A session against a model of it: whatever comes in whatever order, steps are taken in order and
once, a repeated frame is answered alike, and nothing else moves a weight.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from conf.schema import TrainConfig
from simulations.disturb.sessions import OneLayer, check_words
from simulations.equality.fold import fold
from strategies.engine.checks import LARGEST
from strategies.engine.engine import TrunkEngine
from strategies.engine.session import Session
from strategies.errors import PASSING, TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.conversation import Conversation
from strategies.transport.frames import client_frame, read_server_frame
from tests.strategies.helpers import all_in, apply_frame, backward_frame, compute_frame

HIDDEN, STEPS, MICROS, GRAPHS, LIMIT = 4, 3, 3, 2, 2**16
POLICIES = ("splitfed-v1", "splitfed-v2", "merged")

small = st.integers(0, 3)
steps = st.one_of(small, small, small, st.sampled_from([STEPS, 2**31, 2**32 - 1]))
micros = st.one_of(small, small, st.just(2**32 - 1))
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3))
values = st.sampled_from([1.0, -0.5, 1e-30, 1e18, math.nan, math.inf])
usually_fine = st.one_of(st.just(1.0), st.just(1.0), st.just(1.0), values)
norms = st.one_of(
    st.just(0.5), st.just(0.5), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e300])
)


@dataclass
class Forward:
    """A micro-batch as the model knows it."""

    shape: tuple[int, int]
    tokens: int
    sent: bytes
    answer: bytes
    mask_BT: torch.Tensor | None = None
    gone_back: bytes = b""
    gradients: bytes = b""


class SessionMachine(RuleBasedStateMachine):
    """Frames in any order; `forwards`, `applied` and `ready` are the model."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        clip=st.sampled_from([0.0, 1.0]),
        peace=st.sampled_from([0, 1, 2, STEPS, STEPS + 1]),
    )
    def open(self, policy: str, clip: float, peace: int) -> None:
        # Hardly a session survives a wrong frame: until so many steps only right ones come.
        self.peace = peace
        self.sent: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.merged = policy == "merged"
        torch.manual_seed(0)
        trunk = OneLayer(HIDDEN)
        train = TrainConfig(strategy=policy, accumulate=MICROS, clip=clip, lr=0.1)
        self.engine = TrunkEngine(
            trunk,
            hidden_size=HIDDEN,
            train=train,
            timeout=0.2,
            max_sequences=2,
            max_tokens=4,
            max_graphs=GRAPHS,
        )
        self.engine.open_round(1, 1, training=True, cohort=1)
        self.session: Session = self.engine.open("a", client="a", steps=STEPS)
        self.talk = Conversation("a", self.session, all_in("fp32"), lambda report: None, LIMIT)
        self.forwards: dict[int, Forward] = {}
        self.applied, self.ready, self.declared, self.over = 0, False, 0, False
        self.ended, self.result = b"", b""
        self.raw, self.reply = b"", b""
        self.weights = self.read_weights()

    def read_weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.session._lane.parameters]

    def send(self, raw: bytes) -> pb.ServerFrame | None:
        """The answer, a failure after which the session goes on, or None: it is over."""
        self.raw, self.reply = raw, b""
        try:
            self.reply = self.talk.answer(self.raw)
            answer = read_server_frame(self.reply).head
        except TrunkError as refused:
            self.end()
            check_words(str(refused))
            if refused.passes:
                raise AssertionError(f"{refused.kind} ended a session") from refused
            return None
        if answer.WhichOneof("body") == "failure":
            assert answer.failure.kind in PASSING
        return answer

    def end(self) -> None:
        self.session.close()
        self.over = True

    def at_war(self) -> bool:
        return not self.over and self.applied >= self.peace

    def in_a_step(self) -> bool:
        return not self.over and self.applied < STEPS and not self.ready

    def waiting(self) -> list[int]:
        return [micro for micro, each in self.forwards.items() if not each.gradients]

    def fresh(self) -> list[int]:
        return [micro for micro in range(MICROS) if micro not in self.forwards]

    @precondition(lambda self: self.in_a_step() and self.fresh() and len(self.waiting()) < GRAPHS)
    @rule(which=small, shape=shapes, masked=st.booleans())
    def compute_what_is_due(self, which: int, shape: tuple[int, int], masked: bool) -> None:
        micro = self.fresh()[which % len(self.fresh())]
        self.send_compute(self.applied, micro, shape, 1.0, masked)

    @precondition(lambda self: self.in_a_step() and self.waiting())
    @rule(which=small, ends=st.booleans(), tokens=st.integers(1, 2))
    def backward_of_what_waits(self, which: int, ends: bool, tokens: int) -> None:
        waiting = self.waiting()
        micro = waiting[0 if self.merged else which % len(waiting)]
        last = len(waiting) == 1 and (ends or not self.fresh())
        shape = self.forwards[micro].shape
        self.send_backward(self.applied, micro, shape, 1.0, last, tokens)

    @precondition(lambda self: self.at_war() and self.in_a_step())
    @rule(value=st.sampled_from([math.nan, math.inf]))
    def poison(self, value: float) -> None:
        if waiting := self.waiting():
            shape = self.forwards[waiting[0]].shape
            self.send_backward(self.applied, waiting[0], shape, value, False, 1)
        else:
            micro = (self.fresh() or [0])[0]
            self.send_compute(self.applied, micro, (2, 2), value, False)

    @precondition(lambda self: not self.over and self.ready)
    @rule(square=st.sampled_from([0.0, 0.5, 3.0]))
    def apply_what_is_due(self, square: float) -> None:
        self.send_apply(self.applied, square, self.declared if self.merged else 1)

    @precondition(lambda self: not self.over and self.sent)
    @rule(back=st.integers(1, 6))
    def repeat(self, back: int) -> None:
        send, what = self.sent[-min(back, len(self.sent))]
        send(*what)

    @precondition(lambda self: self.at_war())
    @rule(step=steps, micro=micros, shape=shapes, value=usually_fine, masked=st.booleans())
    def compute(
        self, step: int, micro: int, shape: tuple[int, int], value: float, masked: bool
    ) -> None:
        self.send_compute(step, micro, shape, value, masked)

    def send_compute(
        self, step: int, micro: int, shape: tuple[int, int], value: float, masked: bool
    ) -> None:
        self.sent.append((self.send_compute, (step, micro, shape, value, masked)))
        h_BTD = torch.full((*shape, HIDDEN), 0.25)
        h_BTD[0, 0, 0] = value
        mask_BT = torch.ones(shape, dtype=torch.long)
        mask_BT[0, 1:] = 0
        mask = mask_BT if masked else None
        answer = self.send(compute_frame(h_BTD, mask, step=step, micro=micro))
        known = self.forwards.get(micro)
        if known and step == self.applied and self.raw == known.sent and not known.gradients:
            assert self.reply == known.answer
        elif not math.isfinite(value):
            assert answer is None
        elif step < self.applied or (step == self.applied and known):
            assert answer is not None
            assert answer.failure.kind == "stale"
        elif (
            step != self.applied or step >= STEPS or micro >= MICROS
            or self.ready or len(self.waiting()) >= GRAPHS
            or (self.merged and abs(value) > LARGEST)
        ):  # fmt: skip
            assert answer is None
        else:
            assert answer is not None
            assert answer.activations.activations.shape == [*shape, HIDDEN]
            tokens = int(mask_BT.sum()) if masked else mask_BT.numel()
            self.forwards[micro] = Forward(shape, tokens, self.raw, self.reply, mask)

    @precondition(lambda self: self.at_war())
    @rule(step=steps, micro=micros, value=usually_fine, last=st.booleans(), tokens=small)
    def backward(self, step: int, micro: int, value: float, last: bool, tokens: int) -> None:
        known = self.forwards.get(micro)
        self.send_backward(step, micro, known.shape if known else (1, 1), value, last, tokens)

    @precondition(lambda self: self.at_war() and self.waiting())
    @rule(shape=shapes)
    def backward_of_another_shape(self, shape: tuple[int, int]) -> None:
        self.send_backward(self.applied, self.waiting()[0], shape, 1.0, True, 1)

    def send_backward(
        self, step: int, micro: int, shape: tuple[int, int], value: float, last: bool, tokens: int
    ) -> None:
        self.sent.append((self.send_backward, (step, micro, shape, value, last, tokens)))
        known, waiting = self.forwards.get(micro), self.waiting()
        grad_BTD = torch.full((*shape, HIDDEN), 0.5)
        grad_BTD[0, 0, 0] = value
        mask = known.mask_BT if known and known.shape == shape else None
        place = {"step": step, "micro": micro, "last": last, "tokens": tokens}
        answer = self.send(backward_frame(grad_BTD, mask, **place))
        if step < self.applied:
            assert answer is not None
            assert answer.failure.kind == "stale"
        elif step == self.applied and known and known.gradients:
            assert answer is not None
            if self.raw == known.gone_back:
                assert self.reply == known.gradients
            else:
                assert answer.failure.kind == "stale"
        elif (
            step != self.applied or not known or known.shape != shape or not math.isfinite(value)
            or (last and waiting != [micro])
            or (self.merged and (micro != waiting[0] or not tokens or abs(value) > LARGEST))
            or (self.merged and self.declared not in (0, tokens))
        ):  # fmt: skip
            assert answer is None
        else:
            assert answer is not None
            assert answer.gradients.gradient.shape == [*shape, HIDDEN]
            known.gone_back, known.gradients = self.raw, self.reply
            self.ready, self.declared = self.ready or last, tokens

    @precondition(lambda self: not self.over)
    @rule(step=steps, micro=micros)
    def get_gradients(self, step: int, micro: int) -> None:
        answer = self.send(client_frame(get_gradients=pb.GetGradients(step=step, micro=micro)))
        known = self.forwards.get(micro)
        assert answer is not None
        if step == self.applied and known and known.gradients:
            assert self.reply == known.gradients
        else:
            assert answer.failure.kind == "missing"
            assert (answer.failure.step, answer.failure.micro) == (step, micro)

    @precondition(lambda self: self.at_war())
    @rule(step=steps, square=norms, tokens=st.integers(0, 13))
    def apply(self, step: int, square: float, tokens: int) -> None:
        self.send_apply(step, square, tokens)

    @precondition(lambda self: self.at_war())
    @rule(square=norms)
    def apply_without_an_example(self, square: float) -> None:
        self.send_apply(self.applied, square, 0)

    def send_apply(self, step: int, square: float, tokens: int) -> None:
        self.sent.append((self.send_apply, (step, square, tokens)))
        place = {"step": step, "client_square_norm": square, "tokens": tokens}
        answer = self.send(apply_frame(**place))
        most = sum(each.tokens for each in self.forwards.values())
        empty = self.merged and not tokens and not self.forwards
        fine = math.isfinite(square) and square >= 0
        fine = fine and not (self.merged and square > LARGEST**2)
        if self.result and step == self.applied - 1 and self.raw == self.ended:
            assert self.reply == self.result
        elif step < self.applied:
            assert answer is not None
            assert answer.failure.kind == "stale"
        elif (
            step != self.applied or step >= STEPS or not fine
            or (not empty and (not self.ready or not 0 < tokens <= most))
            or (self.merged and not empty and tokens != self.declared)
        ):  # fmt: skip
            assert answer is None
        elif answer is not None:
            assert answer.applied.step == step
            self.take_step(answer, empty)
        else:  # in order, but its gradient or norm was not finite: a session may end for that
            assert not empty

    def take_step(self, answer: pb.ServerFrame, empty: bool) -> None:
        weights = self.read_weights()
        moved = any(not torch.equal(a, b) for a, b in zip(weights, self.weights, strict=True))
        assert moved or empty or answer.applied.grad_norm > 1e6  # clipped to next to nothing
        assert not (moved and empty)
        self.weights, self.ended, self.result = weights, self.raw, self.reply
        self.forwards, self.ready, self.declared = {}, False, 0
        self.applied += 1

    @precondition(lambda self: self.at_war())
    @rule(raw=st.binary(max_size=64))
    def noise(self, raw: bytes) -> None:
        try:
            answer = read_server_frame(self.talk.answer(raw)).head
            assert answer.failure.kind == "damaged"
        except TrunkError:
            self.end()

    @precondition(lambda self: not self.over and self.applied)
    @rule(early=st.booleans())
    def close(self, early: bool) -> None:
        answer = self.send(client_frame(close=pb.Close(early=early)))
        assert answer is not None
        assert answer.closed.steps == self.applied
        self.over = True

    @precondition(lambda self: self.over)
    @rule(step=steps)
    def after_the_end(self, step: int) -> None:
        with pytest.raises(TrunkError):
            self.talk.answer(client_frame(apply=pb.Apply(step=step, tokens=1)))
        assert read_server_frame(self.talk.answer(client_frame(close=pb.Close()))).kind == "closed"

    @invariant()
    def steps_are_counted_once(self) -> None:
        if hasattr(self, "session"):
            assert self.session.applied == self.applied

    @invariant()
    def weights_are_finite_and_moved_by_steps_alone(self) -> None:
        if hasattr(self, "session"):
            for now, before in zip(self.read_weights(), self.weights, strict=True):
                assert torch.isfinite(now).all()
                assert torch.equal(now, before)

    @invariant()
    def bytes_in_flight_are_those_of_the_forwards(self) -> None:
        if hasattr(self, "session"):
            held = [math.prod(each.shape) * HIDDEN * 4 for each in self.forwards.values()]
            kept = [len(each.gradients or each.answer) for each in self.forwards.values()]
            known = sum(held) + sum(kept) + len(self.result)
            assert self.engine.in_flight.bytes == (0 if self.over else known)

    def teardown(self) -> None:
        if hasattr(self, "session"):
            self.session.close()
            assert self.engine.in_flight.bytes == 0
            fold(self.engine, {"a": 1.0})
            assert all(torch.isfinite(p).all() for p in self.engine.trunk.parameters())


QUICK = settings(
    max_examples=300,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_a_session_does_what_the_model_says() -> None:
    run_state_machine_as_test(SessionMachine, settings=QUICK)


@pytest.mark.slow
def test_a_session_does_what_the_model_says_at_length() -> None:
    run_state_machine_as_test(
        SessionMachine, settings=settings(QUICK, max_examples=4000, stateful_step_count=40)
    )


SABOTAGE = {
    "steps are not checked": (
        "strategies.engine.session.Session._check_step",
        lambda self, step: None,
    ),
    "what is not finite is let in": (
        "strategies.engine.session.check_finite",
        lambda tensor, what: None,
    ),
    "nothing is given back": (
        "strategies.engine.checks.InFlight.give_back",
        lambda self, count: None,
    ),
    "norms are not checked": (
        "strategies.engine.session.Session._check_apply",
        lambda *arguments: None,
    ),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_model_sees_a_bug(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*SABOTAGE[what])
    # Many examples: it stops at the first that shows the bug.
    found = settings(QUICK, max_examples=3000, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(Exception):  # noqa: B017 - a wrong answer, or what the bug led to
        run_state_machine_as_test(SessionMachine, settings=found)
