"""What hypothesis and the fuzzer found, each as a test of its own; and frames that were bent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.schema import TrainConfig
from simulations.fuzz_sessions import OneLayer
from strategies.errors import LONGEST_MESSAGE, TrunkError
from strategies.merged import Merged
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec import encode
from strategies.transport.conversation import Conversation
from strategies.transport.frames import (
    client_frame,
    read_client_frame,
    read_server_frame,
    refuse_failure,
    server_frame,
)
from strategies.trunk import TrunkEngine

HIDDEN = 8
WHOLE = client_frame(apply=pb.Apply(step=3, client_square_norm=0.5, tokens=7, loss=1.5))


def open_merged(sync: str = "round") -> TrunkEngine:
    train = TrainConfig(strategy="merged", accumulate=2, sync=sync)
    engine = TrunkEngine(OneLayer(HIDDEN), hidden_size=HIDDEN, train=train, timeout=5.0)
    if sync == "step":
        assert isinstance(engine.policy, Merged)
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
    talk = Conversation("a", session, torch.float32, lambda report: None, 2**20)
    named = pb.NamedTensor(name="n" * 10**5, tensor=encode(torch.ones(3, 2), torch.float32))
    with pytest.raises(TrunkError) as caught:
        talk.answer(client_frame(apply=pb.Apply(gradients=[named])))
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
    talk = Conversation("a", session, torch.float32, lambda report: None, 2**20)
    hidden = pb.Tensor(version=3, dtype=pb.BOOL, codec=pb.BITS, shape=[2**20], data=bytes(2**17))
    named = [
        pb.NamedTensor(name="top.w", tensor=hidden),
        pb.NamedTensor(name="top.w", tensor=encode(torch.ones(3, 2), torch.float32)),
    ]
    with pytest.raises(TrunkError, match="twice"):
        talk.answer(client_frame(apply=pb.Apply(gradients=named)))
