"""A session against a model of it: whatever comes in whatever order, frames are served by their
numbers, steps are taken in order and once, a repeated frame is answered alike while its answer was
not seen, and nothing else moves a weight.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    mask_BT: torch.Tensor | None = None
    gone_back: bool = False


class SessionMachine(RuleBasedStateMachine):
    """Frames in any order; `forwards`, `applied`, `ready`, `due` and `kept` are the model."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        clip=st.sampled_from([0.0, 1.0]),
        peace=st.sampled_from([0, 1, 2, STEPS, STEPS + 1]),
    )
    def open(self, policy: str, clip: float, peace: int) -> None:
        # Hardly a session survives a wrong frame: until so many steps only right ones come.
        self.peace = peace
        self.due, self.seen, self.lag = 1, 0, 0
        self.sent: dict[int, bytes] = {}
        self.kept: dict[int, bytes] = {}
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
        self.reply = b""
        self.weights = self.read_weights()

    def read_weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.session._lane.parameters]

    def next(self) -> dict[str, int]:
        """Of the frame that is due."""
        self.seen = max(self.seen, self.due - 1 - self.lag)
        return {"number": self.due, "seen": self.seen}

    def send(self, raw: bytes) -> pb.ServerFrame | None:
        """The answer to the frame that is due, or None: the session is over."""
        answer = self.give(raw)
        if answer is not None:
            assert answer.number == self.due
            assert answer.WhichOneof("body") != "failure"
            self.kept = {n: reply for n, reply in self.kept.items() if n > self.seen}
            self.kept[self.due], self.sent[self.due] = self.reply, raw
            self.due += 1
        return answer

    def give(self, raw: bytes) -> pb.ServerFrame | None:
        """The answer, a failure after which the session goes on, or None: it is over."""
        self.reply = b""
        try:
            self.reply = self.talk.answer(raw)
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
        return [micro for micro, each in self.forwards.items() if not each.gone_back]

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

    @rule(lag=st.integers(0, 6))
    def see(self, lag: int) -> None:
        """From now on the client says so late what it has seen."""
        self.lag = lag

    @precondition(lambda self: not self.over and self.sent)
    @rule(back=st.integers(1, 8))
    def repeat(self, back: int) -> None:
        number = max(1, self.due - back)
        answer = self.give(self.sent[number])
        assert answer is not None
        assert answer.number == number
        if number in self.kept:
            assert self.reply == self.kept[number]
        else:
            assert answer.failure.kind == "stale"

    @precondition(lambda self: not self.over)
    @rule(by=st.integers(1, 9), step=steps)
    def come_before_another(self, by: int, step: int) -> None:
        """Even what would be in order is not served."""
        raw = client_frame(apply=pb.Apply(step=step, tokens=1), number=self.due + by, seen=by)
        answer = self.give(raw)
        assert answer is not None
        assert (answer.failure.kind, answer.number) == ("gap", self.due + by)

    @precondition(lambda self: self.at_war() and self.kept)
    @rule(number=st.integers(0, 9), tokens=st.integers(90, 99))
    def come_again_with_other_bytes(self, number: int, tokens: int) -> None:
        number = sorted(self.kept)[number % len(self.kept)] if number else 0
        raw = client_frame(apply=pb.Apply(step=self.applied, tokens=tokens), number=number)
        assert self.give(raw) is None

    @precondition(lambda self: self.at_war())
    @rule(step=steps, micro=micros, shape=shapes, value=usually_fine, masked=st.booleans())
    def compute(
        self, step: int, micro: int, shape: tuple[int, int], value: float, masked: bool
    ) -> None:
        self.send_compute(step, micro, shape, value, masked)

    def send_compute(
        self, step: int, micro: int, shape: tuple[int, int], value: float, masked: bool
    ) -> None:
        h_BTD = torch.full((*shape, HIDDEN), 0.25)
        h_BTD[0, 0, 0] = value
        mask_BT = torch.ones(shape, dtype=torch.long)
        mask_BT[0, 1:] = 0
        mask = mask_BT if masked else None
        answer = self.send(compute_frame(h_BTD, mask, step=step, micro=micro, **self.next()))
        if (
            step != self.applied or step >= STEPS or micro >= MICROS or micro in self.forwards
            or not math.isfinite(value) or self.ready or len(self.waiting()) >= GRAPHS
            or (self.merged and abs(value) > LARGEST)
        ):  # fmt: skip
            assert answer is None
        else:
            assert answer is not None
            assert answer.activations.activations.shape == [*shape, HIDDEN]
            tokens = int(mask_BT.sum()) if masked else mask_BT.numel()
            self.forwards[micro] = Forward(shape, tokens, mask)

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
        known, waiting = self.forwards.get(micro), self.waiting()
        grad_BTD = torch.full((*shape, HIDDEN), 0.5)
        grad_BTD[0, 0, 0] = value
        mask = known.mask_BT if known and known.shape == shape else None
        place = {"step": step, "micro": micro, "last": last, "tokens": tokens}
        answer = self.send(backward_frame(grad_BTD, mask, **place, **self.next()))
        if (
            step != self.applied or not known or known.gone_back
            or known.shape != shape or not math.isfinite(value)
            or (last and waiting != [micro])
            or (self.merged and (micro != waiting[0] or not tokens or abs(value) > LARGEST))
            or (self.merged and self.declared not in (0, tokens))
        ):  # fmt: skip
            assert answer is None
        else:
            assert answer is not None
            assert answer.gradients.gradient.shape == [*shape, HIDDEN]
            known.gone_back = True
            self.ready, self.declared = self.ready or last, tokens

    @precondition(lambda self: not self.over)
    @rule(back=st.integers(-2, 8))
    def get_gradients(self, back: int) -> None:
        number = max(0, self.due - back)
        answer = self.give(client_frame(get_gradients=pb.GetGradients(), number=number))
        assert answer is not None
        if number in self.kept:
            assert self.reply == self.kept[number]
        else:
            assert (answer.failure.kind, answer.number) == ("missing", number)

    @precondition(lambda self: self.at_war())
    @rule(step=steps, square=norms, tokens=st.integers(0, 13))
    def apply(self, step: int, square: float, tokens: int) -> None:
        self.send_apply(step, square, tokens)

    @precondition(lambda self: self.at_war())
    @rule(square=norms)
    def apply_without_an_example(self, square: float) -> None:
        self.send_apply(self.applied, square, 0)

    def send_apply(self, step: int, square: float, tokens: int) -> None:
        place = {"step": step, "client_square_norm": square, "tokens": tokens}
        answer = self.send(apply_frame(**place, **self.next()))
        most = sum(each.tokens for each in self.forwards.values())
        empty = self.merged and not tokens and not self.forwards
        fine = math.isfinite(square) and square >= 0
        fine = fine and not (self.merged and square > LARGEST**2)
        if (
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
        self.weights = weights
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
        answer = self.give(client_frame(close=pb.Close(early=early)))
        assert answer is not None
        assert answer.closed.steps == self.applied
        self.over = True

    @precondition(lambda self: self.over)
    @rule(step=steps)
    def after_the_end(self, step: int) -> None:
        with pytest.raises(TrunkError):
            self.talk.answer(apply_frame(step=step, tokens=1, number=self.due))
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
            known = sum(held) + sum(map(len, self.kept.values()))
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
        "strategies.engine.session.check_bounded",
        lambda tensor, what: None,
    ),
    "nothing is given back": (
        "strategies.engine.checks.InFlight.give_back",
        lambda self, count: None,
    ),
    "frames are served as they come": (
        "strategies.transport.kept.KeptReplies.again",
        lambda self, frame, raw: None,
    ),
    "other bytes are taken for the same": (
        "strategies.transport.kept.checksum_of",
        lambda raw: b"",
    ),
    "what was seen is kept": (
        "strategies.transport.kept.KeptReplies._forget",
        lambda self, seen: None,
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
