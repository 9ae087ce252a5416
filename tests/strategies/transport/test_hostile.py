"""What hypothesis and the fuzzer found, each as a test of its own; and frames that were bent."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import TrainConfig
from simulations.disturb.sessions import OneLayer
from strategies.engine.engine import TrunkEngine
from strategies.engine.lane import StepResult
from strategies.engine.session import Session
from strategies.errors import LONGEST_MESSAGE, TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import encode_named
from strategies.transport.conversation import Conversation
from strategies.transport.frames import (
    MAX_HEAD,
    client_frame,
    read_client_frame,
    read_server_frame,
    refuse_failure,
    server_frame,
)
from strategies.transport.payload import Parcel
from tests.strategies.helpers import all_in, apply_frame, compute_frame

HIDDEN = 8
WHOLE = client_frame(apply=pb.Apply(step=3, client_square_norm=0.5, tokens=7, loss=1.5))


def open_merged(sync: str = "round") -> TrunkEngine:
    train = TrainConfig(strategy="merged", accumulate=2, sync=sync)
    torch.manual_seed(0)
    engine = TrunkEngine(OneLayer(HIDDEN), hidden_size=HIDDEN, train=train, timeout=5.0)
    if sync == "step":
        engine.policy.start_ends({"top.w": torch.zeros(3, 2)})
    engine.open_round(1, 1, training=True, cohort=1)
    return engine


@given(at=st.integers(0, len(WHOLE) * 8 - 1))
def test_any_flipped_bit_is_noticed(at: int) -> None:
    bent = bytearray(WHOLE)
    bent[at // 8] ^= 1 << at % 8
    with pytest.raises(TrunkError) as caught:
        read_client_frame(bytes(bent))
    assert caught.value.kind == "damaged"


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_any_truncation_is_noticed(length: int) -> None:
    """An empty frame fits the checksum of nothing, and was taken for another release's."""
    with pytest.raises(TrunkError) as caught:
        read_client_frame(WHOLE[:length])
    assert caught.value.kind == "damaged"


def test_a_head_is_not_read_if_it_is_too_long() -> None:
    """A message without content takes two bytes of it, and 64 once it is read."""
    whole = client_frame(apply=pb.Apply(gradients=[pb.NamedTensor()] * (MAX_HEAD // 2)))
    for read in (read_client_frame, read_server_frame):
        with pytest.raises(TrunkError, match=f"a frame's head of .* {MAX_HEAD} are accepted") as no:
            read(whole)
        assert no.value.kind == "shape"
    rows = range(2**18, 2**18 + 2**20)
    fits = client_frame(apply=pb.Apply(gradients=[pb.NamedTensor(rows=rows)]))
    assert len(read_client_frame(fits).head.apply.gradients[0].rows) == 2**20


@given(raw=st.binary(max_size=200))
def test_noise_is_refused_in_words(raw: bytes) -> None:
    for read in (read_client_frame, read_server_frame):
        with pytest.raises(TrunkError):
            read(raw)


def test_merged_goes_back_in_the_order_of_the_forwards() -> None:
    """By number, micro-batch 0 went back through the graph of 1, which had come first."""
    session = open_merged().open("a", client="a", steps=1)
    session.compute(0, 1, torch.ones(2, 3, HIDDEN), None)
    session.compute(0, 0, torch.ones(1, 2, HIDDEN), None)
    with pytest.raises(TrunkError, match="0 goes back before 1"):
        session.backward(0, 0, torch.ones(1, 2, HIDDEN), last=False, tokens=8)
    grad_BTD, _ = session.backward(0, 1, torch.ones(2, 3, HIDDEN), last=False, tokens=8)
    assert grad_BTD.shape == (2, 3, HIDDEN)


def test_merged_goes_back_twice_through_a_batch_that_two_come_to_at_different_times() -> None:
    """It failed for all of the cohort: the graph was gone with the first of them."""
    engine = open_merged()
    generator = torch.Generator().manual_seed(0)
    first, common, own = (torch.randn(2, 3, HIDDEN, generator=generator) for _ in range(3))
    one = torch.ones(2, 3, HIDDEN)
    a = engine.open("a", client="a", steps=1)
    a.compute(0, 0, first, None)
    b = engine.open("b", client="b", steps=1)
    with ThreadPoolExecutor(2) as pool:

        def both(one: Callable[[], Any], other: Callable[[], Any]) -> list[Any]:
            return [each.result(10) for each in [pool.submit(one), pool.submit(other)]]

        both(lambda: a.compute(0, 1, common, None), lambda: b.compute(0, 0, common, None))
        earlier = both(
            lambda: a.backward(0, 0, one, last=False, tokens=12),
            lambda: b.backward(0, 0, one, last=False, tokens=12),
        )

        def rest_of_b() -> tuple[torch.Tensor, float]:
            b.compute(0, 1, own, None)
            return b.backward(0, 1, one, last=True, tokens=12)

        results = both(lambda: a.backward(0, 1, one, last=True, tokens=12), rest_of_b)

    again = open_merged().open("all", client="all", steps=1)
    again.compute(0, 0, torch.cat([first, common]), None)
    again.backward(0, 0, torch.cat([one, one]) / 2, last=False, tokens=24)
    again.compute(0, 1, torch.cat([common, own]), None)
    _, square = again.backward(0, 1, torch.cat([one, one]) / 2, last=True, tokens=24)
    assert results[0][1] == results[1][1] == pytest.approx(square, rel=1e-5)
    assert torch.equal(results[0][0], earlier[1][0])


@pytest.mark.parametrize("square", [-1.0, float("nan"), float("inf")])
def test_a_merged_step_without_an_example_takes_no_impossible_norm(square: float) -> None:
    """It failed for all of the cohort, with a ValueError about a math domain."""
    session = open_merged().open("a", client="a", steps=1)
    with pytest.raises(TrunkError, match="norm"):
        session.apply(0, client_square_norm=square, tokens=0)
    assert session.applied == 0


def test_a_refusal_quotes_little_of_what_was_sent() -> None:
    engine = open_merged("step")
    session = engine.open("a", client="a", steps=1)
    talk = Conversation("a", session, all_in("fp32"), lambda report: None, 2**20)
    with pytest.raises(TrunkError) as caught:
        talk.answer(apply_frame({"n" * 10**5: torch.ones(3, 2)}))
    assert len(str(caught.value)) < LONGEST_MESSAGE + 50


@pytest.mark.parametrize("message", ["", "  \n", "m" * 10**5])
def test_a_failure_is_told_in_words_whatever_it_says(message: str) -> None:
    failure = pb.Failure(kind="k" * 10**5, message=message)
    with pytest.raises(TrunkError) as caught:
        refuse_failure(read_server_frame(server_frame(failure=failure)))
    assert str(caught.value).strip()
    assert len(str(caught.value)) < LONGEST_MESSAGE + 50
    assert len(caught.value.kind) < 50


def test_no_tensor_hides_behind_another_of_its_name() -> None:
    """The shape of the last was checked, and every one was unpacked."""
    session = open_merged("step").open("a", client="a", steps=1)
    talk = Conversation("a", session, all_in("fp32"), lambda report: None, 2**20)
    parcel = Parcel()
    named = [*encode_named({"top.w": torch.ones(2**14)}, parcel)]
    named += encode_named({"top.w": torch.ones(3, 2)}, parcel)
    with pytest.raises(TrunkError, match="2 named tensors came, there are 1"):
        talk.answer(client_frame(parcel, number=1, apply=pb.Apply(gradients=named)))


@pytest.mark.parametrize("value", [1.0, 1e12])
def test_merged_drops_what_a_client_left_behind_in_a_step_that_nobody_ended(value: float) -> None:
    """It was applied by the next step, though it was never weighed, normed or clipped: the trunk
    that all clients share was lost."""
    engine = open_merged()
    before = [p.detach().clone() for p in engine.trunk.parameters()]
    leaves = engine.open("leaves", client="leaves", steps=1)
    leaves.compute(0, 0, torch.full((2, 3, HIDDEN), value), None)
    leaves.backward(0, 0, torch.full((2, 3, HIDDEN), value), last=False, tokens=6)
    leaves.close()

    stays = engine.open("stays", client="stays", steps=2)
    assert stays.apply(0, client_square_norm=0.0, tokens=0).grad_norm == 0.0
    for parameter, first in zip(engine.trunk.parameters(), before, strict=True):
        assert torch.equal(parameter, first)
        assert parameter.grad is None

    stays.compute(1, 0, torch.ones(2, 3, HIDDEN), None)
    stays.backward(1, 0, torch.ones(2, 3, HIDDEN), last=True, tokens=6)
    stays.apply(1, client_square_norm=0.0, tokens=6)
    assert all(torch.isfinite(p).all() for p in engine.trunk.parameters())
    assert not torch.equal(next(engine.trunk.parameters()), before[0])


def test_who_comes_in_mid_round_gets_all_of_the_common_ends() -> None:
    """The others get what the step has changed: to one who has older tensors that is not enough."""
    engine = open_merged("step")
    one = torch.ones(2, 3, HIDDEN)

    def steps(session: Session, number: int) -> StepResult:
        session.compute(number, 0, one, None)
        session.backward(number, 0, one, last=True, tokens=6)
        gradients = {"top.w": torch.ones(3, 2)}
        return session.apply(number, client_square_norm=1.0, tokens=6, gradients=gradients)

    first = engine.open("a", client="a", steps=3)
    assert steps(first, 0).since is not None
    late = engine.open("b", client="b", steps=2)
    with ThreadPoolExecutor(2) as pool:
        for number, (had, has) in enumerate(((True, False), (True, True))):
            both = [pool.submit(steps, first, number + 1), pool.submit(steps, late, number)]
            results = [each.result(10) for each in both]
            assert [each.since is not None for each in results] == [had, has]
    before, after = results[0].since, results[0].state
    assert before is not None
    assert not torch.equal(before["top.w"], after["top.w"])


def test_who_asks_as_patiently_as_a_client_may_is_not_given_up() -> None:
    """After each eighth of `link.timeout`: the question, and all that the largest window takes."""
    engine = open_merged()
    session = engine.open("a", client="a", steps=1)
    talk = Conversation("a", session, all_in("fp32"), lambda report: None, 2**20)
    frame = compute_frame(torch.zeros(1, 2, HIDDEN))
    answer = talk.answer(frame)
    for _ in range(8 * (1 + 2 * 8 + 1)):
        assert talk.answer(frame) == answer
