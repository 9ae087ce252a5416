"""Codecs: a new one is one file; what comes in is bounded; what is sent again is the same bytes."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash

from conf.schema import TrainConfig
from flower_app.client import streamed
from models import split
from simulations.disturb.faults import DOWN, UP, Faults
from strategies.errors import TrunkError
from strategies.transport import codec as folder
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.registry import codecs, crossings, find_codec
from strategies.transport.conversation import Conversation
from strategies.transport.frames import WIRE_VERSION, client_frame, read_server_frame
from strategies.transport.payload import Parcel, Payload
from strategies.transport.stream.link import GrpcLink
from tests.strategies.helpers import (
    CUT,
    NODE_KEY,
    H,
    admit,
    all_in,
    apply_frame,
    backward_frame,
    compute_frame,
    connect,
    engine_for,
    largest_difference,
    link_config,
    open_engine,
    place,
    random_steps,
    served,
    tiny_model,
)

TOY = '''
"""The `ternary` codec: -1, 0 or 1 times the largest element, rounded at random, and compressed."""

import zlib

import torch

from strategies.transport.codec.codec import Codec


class Ternary(Codec):
    name = "ternary"

    def __init__(self, seed=0, *, gradient=False):
        super().__init__(seed, gradient=gradient)
        self.count = 0

    def sizes(self, rows, width):
        return 1, 4 + 64 + 2 * rows * width

    def pack(self, tensor, generator):
        self.count += 1  # a state: no two tensors are rounded alike
        largest = tensor.abs().max().clamp_min(1e-30)
        share = tensor / largest
        draw = torch.rand(tensor.shape, generator=generator) + 1e-6 * self.count
        signs = torch.where(draw < share.abs(), share.sign(), torch.zeros(()))
        data = signs.to(torch.int8).numpy().tobytes()
        return largest.numpy().tobytes() + zlib.compress(data)

    def unpack(self, data, shape):
        elements, data = torch.Size(shape).numel(), bytes(data)
        try:
            signs = zlib.decompressobj().decompress(data[4:], elements)
        except zlib.error as error:
            raise ValueError(error) from None
        if len(signs) != elements:
            raise ValueError(f"{len(signs)} of {elements} elements")
        signs = torch.frombuffer(bytearray(signs), dtype=torch.int8).float().reshape(shape)
        return signs * torch.frombuffer(bytearray(data[:4]), dtype=torch.float32)
'''


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[None]:
    """A folder of somebody else's that the package looks into, too."""
    (tmp_path / "toy_ternary.py").write_text(TOY)
    folder.__path__.append(str(tmp_path))
    yield
    folder.__path__.remove(str(tmp_path))
    sys.modules.pop(f"{folder.__name__}.toy_ternary", None)


def test_the_codecs_that_ship() -> None:
    assert list(codecs()) == [
        *("bf16", "fp16", "fp32"),
        *("int2", "int3", "int4", "int5", "int6", "int8"),
        *("klt", "klt-coarse", "klt-fine", "klt-rough"),
    ]
    with pytest.raises(ValueError, match="one of bf16, fp16, fp32, int2, .*, got 'fp8'"):
        find_codec("fp8")


def test_a_frame_lies_on_the_wire_as_trunk_proto_says() -> None:
    """Read by hand: checksum, length, head, payload."""
    h_BTD = torch.tensor([[[1.0, -2.5], [3e-6, 0.0], [1e4, 7.0]]])
    raw = compute_frame(h_BTD, torch.tensor([[1, 1, 0]]), step=2, micro=1)

    length = int.from_bytes(raw[8:12], "little")
    head = pb.ClientFrame.FromString(raw[12 : 12 + length])
    tensor = head.compute.activations
    payload = raw[12 + length :]

    assert raw[:8] == xxhash.xxh3_64_intdigest(raw[8:]).to_bytes(8, "little")
    assert (head.version, head.compute.step, head.compute.micro) == (WIRE_VERSION, 2, 1)
    assert (list(tensor.shape), tensor.codec) == ([1, 3, 2], "fp32")
    assert head.compute.mask == b"\xc0"
    assert payload[tensor.offset :][: tensor.size] == h_BTD[0, :2].numpy().tobytes()
    assert len(payload) == tensor.size


@pytest.mark.parametrize("name", codecs())
def test_what_is_not_finite_is_not_hidden(name: str) -> None:
    """Or a client whose training has diverged would go unnoticed."""
    for value in (float("nan"), float("inf"), float("-inf")):
        for gradient in (False, True):
            codec, parcel = find_codec(name)(3, gradient=gradient), Parcel()
            h_BTD = torch.randn(2, 4, 32)
            h_BTD[1, 2, 7] = value
            message = codec.encode(h_BTD, None, 0, 0, parcel)
            other = find_codec(name)(3, gradient=gradient)
            back = other.decode(message, None, Payload(b"".join(parcel.parts)), "it")
            assert not torch.isfinite(back).all()


@pytest.mark.usefixtures("stranger")
def test_a_strangers_codec_trains_over_the_stream_and_repeats_its_bytes(one_thread: None) -> None:
    """Frames and replies that are lost do not move a bit, though no two roundings are alike."""
    results = []
    lost = {(UP, 0): "lose", (DOWN, 1): "break", (DOWN, 2): "lose", (UP, 4): "lose"}
    for schedule in ({}, lost):
        model = tiny_model()
        parts = split(model, CUT)
        engine = engine_for(parts.trunk, TrainConfig(optimizer="sgd", lr=0.1))
        engine.open_round(1, 1, training=True)
        with served(engine, codec="ternary", timeout=4.0) as service:
            faults = Faults(schedule)
            config = link_config(codec="ternary", timeout=4.0)
            link = GrpcLink(
                admit(service, "a"), NODE_KEY, steps=2, config=config, interceptors=[faults]
            )
            steps = random_steps(2, seed=1)
            done = streamed.train(
                parts.bottom, parts.top, link, steps, 2, TrainConfig(lr=0.1), place("a")
            )
            link.close()
            assert sum(faults.met.values()) == len(schedule)
        results.append((model, done.losses))

    assert results[0][1] == results[1][1]
    assert largest_difference(results[0][0], results[1][0]) == 0


@pytest.mark.usefixtures("stranger")
def test_a_lost_reply_is_sent_again_as_it_was() -> None:
    engine = open_engine()
    talk = Conversation(
        "a", engine.open("a", steps=1), all_in("ternary"), lambda report: None, 2**20
    )
    compute = compute_frame(H, codec="ternary")
    parcel = Parcel()
    gradient = crossings(all_in("ternary"), 0).grad_h2.encode(H, None, 0, 0, parcel)
    body = pb.Backward(gradient=gradient, last=True)
    backward = client_frame(parcel, number=2, seen=1, backward=body)
    question = client_frame(number=2, get_gradients=pb.GetGradients())
    apply = apply_frame(tokens=4, number=3, seen=2)

    first = talk.answer(compute)
    assert talk.answer(compute) == talk.answer(compute) == first
    back = talk.answer(backward)
    assert talk.answer(backward) == talk.answer(question) == back
    assert engine.in_flight.bytes == H.nbytes + len(back)
    applied = talk.answer(apply)
    assert talk.answer(apply) == applied
    assert engine.in_flight.bytes == len(applied)
    talk.answer(client_frame(close=pb.Close()))
    assert engine.in_flight.bytes == 0


def test_what_comes_after_its_reply_was_dropped_is_not_decoded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread of a broken stream may bring a frame late; a codec's state moved a second time."""
    codec, decoded = find_codec("fp32"), []
    usual = codec.decode
    monkeypatch.setattr(
        codec, "decode", lambda self, *what: (decoded.append(what[-1]), usual(self, *what))[1]
    )
    engine = open_engine(accumulate=2)
    talk = Conversation("a", engine.open("a", steps=2), all_in("fp32"), lambda report: None, 2**20)
    compute, backward = compute_frame(H), backward_frame(H, last=True, number=2, seen=1)
    apply = apply_frame(tokens=4, number=3, seen=2)

    replies = [talk.answer(raw) for raw in (compute, backward, compute, apply, compute, backward)]

    bodies = [read_server_frame(raw).kind for raw in replies]
    assert bodies == ["activations", "gradients", "failure", "applied", "failure", "failure"]
    assert decoded == ["activations", "gradient"]


def test_kept_replies_are_bounded_by_what_may_be_in_flight() -> None:
    """A reply counts like the activations it answers."""
    engine = open_engine()
    room = 2 * H.nbytes
    engine.bench.in_flight.limit = room
    talk = Conversation("a", engine.open("a", steps=1), all_in("fp32"), lambda report: None, 2**20)
    with pytest.raises(TrunkError, match="exceed link.max_in_flight_mb") as busy:
        talk.answer(compute_frame(H))
    assert busy.value.kind == "busy"


def test_a_frame_comes_again_as_it_was_or_not_at_all() -> None:
    engine = open_engine()
    talk = Conversation("a", engine.open("a", steps=1), all_in("fp32"), lambda report: None, 2**20)
    talk.answer(compute_frame(H))
    with pytest.raises(TrunkError, match="frame 1 came again with other bytes"):
        talk.answer(compute_frame(H + 1))


def packed(codec: Codec, h_BTD: torch.Tensor, step: int = 0, micro: int = 0) -> bytes:
    """The data alone."""
    parcel = Parcel()
    codec.encode(h_BTD, None, step, micro, parcel)
    return bytes(parcel.parts[0])


@pytest.mark.usefixtures("stranger")
def test_codecs_draw_by_crossing_step_and_micro_batch() -> None:
    one, again, other = (crossings(all_in("ternary"), seed) for seed in (1, 1, 2))
    first = packed(one.h1, H)

    assert packed(again.h1, H) == first
    assert packed(other.h1, H) != first
    assert packed(one.h2, H) != first
    assert packed(again.h1, H, 0, 1) != first


def test_a_sessions_codecs_draw_from_seed_round_and_client_alone() -> None:
    """Not from the session's name, in which a node's number and the attempt are."""

    def seed(key: str, client: str, run: int = 0, round: int = 1) -> int:
        engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig(), seed=run)
        engine.open_round(round, 9, training=True)
        told = engine.codec_seed(client)
        assert engine.open(key, client=client, steps=1).codec_seed == told
        return told

    first = seed("1-a", "a")
    assert seed("2-a", "a") == first
    others = [seed("1-a", "b"), seed("1-a", "a", run=1), seed("1-a", "a", round=2)]
    assert len({first, *others}) == 4


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "take 1 to 388 bytes, 0 came"),
        (bytes(389), "take 1 to 388 bytes, 389 came"),
        (b"\0" * 30, "is no codec ternary"),
        (bytes(4) + zlib.compress(bytes(99)), "is no codec ternary: 99 of 160 elements"),
    ],
)
def test_what_is_not_of_the_codec_is_refused_before_memory_is_taken(
    data: bytes, words: str
) -> None:
    codec = find_codec("ternary")()
    message = Parcel().put((1, 5, 32), "ternary", data)

    with pytest.raises(TrunkError, match=words):
        codec.decode(message, None, Payload(data), "activations")


@pytest.mark.usefixtures("stranger")
def test_a_bomb_unpacks_to_no_more_than_its_shape() -> None:
    data = bytes(4) + zlib.compress(bytes(10**5), 9)
    message = Parcel().put((1, 5, 32), "ternary", data)
    h_BTD = find_codec("ternary")().decode(message, None, Payload(data), "activations")
    assert h_BTD.shape == (1, 5, 32)


def test_a_trunk_with_other_codecs_is_refused_in_words() -> None:
    """Before anything is encoded."""
    with (
        served(open_engine(), codec="h1=bf16 h2=fp16") as service,
        pytest.raises(TrunkError, match="h2 travels as bf16 here and as fp16 there") as refused,
    ):
        connect(service, "a", 1, codec="h1=bf16 h2=bf16")
    assert refused.value.kind == "codec"
