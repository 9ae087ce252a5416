"""Codecs: a new one is one file; those that ship have kept every byte; what comes in is bounded."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conf.schema import TrainConfig
from flower_app.client import streamed
from models import split
from simulations.disturb.faults import DOWN, UP, Faults
from strategies.errors import TrunkError
from strategies.transport import codec as folder
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import codecs, crossings, find_codec
from strategies.transport.codec.tensors import encode, encode_mask
from strategies.transport.conversation import Conversation
from strategies.transport.frames import client_frame, read_server_frame, server_frame
from strategies.transport.stream.link import GrpcLink
from tests.strategies.helpers import (
    CUT,
    NODE_KEY,
    H,
    admit,
    engine_for,
    largest_difference,
    link_config,
    open_engine,
    place,
    random_steps,
    served,
    tiny_model,
)

RECORDED = {
    "fp32": (
        "0d2197b4e2124808031244080210011a2a080310011a0301030220012d0000803f32180000803f00"
        "0020c09c5349360000000000401c460000e0402212080310041a02010320032d0000803f3201c0",
        "0d4d652b7b123808031a34080210011a2a080310011a0301030220012d0000803f32180000803f00"
        "0020c09c5349360000000000401c460000e04020012805",
        "0d69083d8c123d08031a39080210011a2a080310011a0301030220012d0000803f32180000803f00"
        "0020c09c5349360000000000401c460000e04021000000000000e03f",
        "0d92ee9084124608032242080210011a2a080310011a0301030220012d0000803f32180000803f00"
        "0020c09c5349360000000000401c460000e04021000000000000d03f29000000000000e03f",
    ),
    "fp16": (
        "0d3a1ea442123c08031238080210011a1e080310021a0301030220022d0000803f320c003c00c132"
        "000000e27000472212080310041a02010320032d0000803f3201c0",
        "0d5bdcaa42122c08031a28080210011a1e080310021a0301030220022d0000803f320c003c00c132"
        "000000e270004720012805",
        "0d0d250b37123108031a2d080210011a1e080310021a0301030220022d0000803f320c003c00c132"
        "000000e270004721000000000000e03f",
        "0dc8fe8059123a08032236080210011a1e080310021a0301030220022d0000803f320c003c00c132"
        "000000e270004721000000000000d03f29000000000000e03f",
    ),
    "bf16": (
        "0d405e1969123c08031238080210011a1e080310031a0301030220012d0000803f320c803f20c049"
        "3600001c46e0402212080310041a02010320032d0000803f3201c0",
        "0d554e1059122c08031a28080210011a1e080310031a0301030220012d0000803f320c803f20c049"
        "3600001c46e04020012805",
        "0d1f028dfe123108031a2d080210011a1e080310031a0301030220012d0000803f320c803f20c049"
        "3600001c46e04021000000000000e03f",
        "0dc46f24f5123a08032236080210011a1e080310031a0301030220012d0000803f320c803f20c049"
        "3600001c46e04021000000000000d03f29000000000000e03f",
    ),
}
"""Frames of a release before codecs were objects: Compute, Backward, Activations, Gradients."""

TOY = '''
"""The `ternary` codec: -1, 0 or 1 times the largest element, rounded at random, and compressed."""

import zlib

import torch

from strategies.transport.codec.codec import Codec


class Ternary(Codec):
    name = "ternary"

    def __init__(self, seed=0):
        super().__init__(seed)
        self.count = 0

    def sizes(self, elements):
        return 1, 4 + 64 + 2 * elements

    def pack(self, tensor, generator):
        self.count += 1  # a state: no two tensors are rounded alike
        largest = tensor.abs().max().clamp_min(1e-30)
        share = tensor / largest
        draw = torch.rand(tensor.shape, generator=generator) + 1e-6 * self.count
        signs = torch.where(draw < share.abs(), share.sign(), torch.zeros(()))
        data = signs.to(torch.int8).numpy().tobytes()
        return largest.numpy().tobytes() + zlib.compress(data)

    def unpack(self, data, shape):
        elements = torch.Size(shape).numel()
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
    assert list(codecs()) == ["bf16", "fp16", "fp32"]
    with pytest.raises(ValueError, match="one of bf16, fp16, fp32, got 'fp8'"):
        find_codec("fp8")


@pytest.mark.parametrize("name", RECORDED)
def test_the_wire_has_not_changed_by_a_bit(name: str) -> None:
    """In both directions, and in every field."""
    h_BTD = torch.tensor([[[1.0, -2.5], [3e-6, 0.0], [1e4, 7.0]]])
    own, at = crossings(name, "s"), {"step": 2, "micro": 1}
    compute = pb.Compute(**at, activations=own.h1.encode(h_BTD, 2, 1))
    compute.mask.CopyFrom(encode_mask(torch.tensor([[1, 1, 0]])))
    backward = pb.Backward(**at, gradient=own.grad_h2.encode(h_BTD, 2, 1), last=True, tokens=5)
    output = pb.Activations(**at, activations=own.h2.encode(h_BTD, 2, 1), seconds=0.5)
    gradient = own.grad_h1.encode(h_BTD, 2, 1)
    back = pb.Gradients(**at, gradient=gradient, square_norm=0.25, seconds=0.5)

    frames = (
        client_frame(compute=compute),
        client_frame(backward=backward),
        server_frame(activations=output),
        server_frame(gradients=back),
    )

    assert tuple(frame.hex() for frame in frames) == RECORDED[name]
    assert torch.allclose(own.grad_h1.decode(gradient, "it").float(), h_BTD, rtol=1e-2)


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
        with served(engine, dtype="ternary", timeout=4.0) as service:
            faults = Faults(schedule)
            config = link_config(dtype="ternary", timeout=4.0)
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
    talk = Conversation("a", engine.open("a", steps=1), "ternary", lambda report: None, 2**20)
    mine = crossings("ternary", "a")
    compute = client_frame(compute=pb.Compute(activations=mine.h1.encode(H, 0, 0)), number=1)
    gradient = mine.grad_h2.encode(H, 0, 0)
    backward = client_frame(backward=pb.Backward(gradient=gradient, last=True), number=2, seen=1)
    question = client_frame(get_gradients=pb.GetGradients(), number=2)
    apply = client_frame(apply=pb.Apply(tokens=4), number=3, seen=2)

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
        codec, "decode", lambda self, *what: (decoded.append(what[1]), usual(self, *what))[1]
    )
    engine = open_engine(accumulate=2)
    talk = Conversation("a", engine.open("a", steps=2), "fp32", lambda report: None, 2**20)
    tensor = encode(H, torch.float32)
    compute = client_frame(compute=pb.Compute(activations=tensor), number=1)
    backward = client_frame(backward=pb.Backward(gradient=tensor, last=True), number=2, seen=1)
    apply = client_frame(apply=pb.Apply(tokens=4), number=3, seen=2)

    replies = [talk.answer(raw) for raw in (compute, backward, compute, apply, compute, backward)]

    bodies = [read_server_frame(raw).WhichOneof("body") for raw in replies]
    assert bodies == ["activations", "gradients", "failure", "applied", "failure", "failure"]
    assert decoded == ["activations", "gradient"]


def test_kept_replies_are_bounded_by_what_may_be_in_flight() -> None:
    """A reply counts like the activations it answers."""
    engine = open_engine()
    room = 2 * H.nbytes
    engine.bench.in_flight.limit = room
    talk = Conversation("a", engine.open("a", steps=1), "fp32", lambda report: None, 2**20)
    with pytest.raises(TrunkError, match="exceed link.max_in_flight_mb") as busy:
        talk.answer(
            client_frame(compute=pb.Compute(activations=encode(H, torch.float32)), number=1)
        )
    assert busy.value.kind == "busy"


def test_a_frame_comes_again_as_it_was_or_not_at_all() -> None:
    engine = open_engine()
    talk = Conversation("a", engine.open("a", steps=1), "fp32", lambda report: None, 2**20)
    frames = [
        client_frame(compute=pb.Compute(activations=encode(tensor, torch.float32)), number=1)
        for tensor in (H, H + 1)
    ]
    talk.answer(frames[0])
    with pytest.raises(TrunkError, match="frame 1 came again with other bytes"):
        talk.answer(frames[1])


@pytest.mark.usefixtures("stranger")
def test_codecs_draw_by_crossing_step_and_micro_batch() -> None:
    one, again, other = (crossings("ternary", key) for key in ("a", "a", "b"))
    first = one.h1.encode(H, 0, 0).data

    assert again.h1.encode(H, 0, 0).data == first
    assert other.h1.encode(H, 0, 0).data != first
    assert one.h2.encode(H, 0, 0).data != first
    assert again.h1.encode(H, 0, 1).data != first


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec_name": "fp4"}, "codec 'fp4' is not known here; known are bf16, fp16, fp32, tern"),
        ({"codec_name": "n" * 10**5}, "codec 'nnn"),
        ({"codec_name": "bf16"}, "bf16 came, ternary was agreed"),
        ({"codec_name": "", "dtype": pb.FLOAT32}, "dtype 1, codec 0 came, ternary was agreed"),
        ({"version": 9}, "version 9 came"),
        ({"data": b""}, "takes 1 to 388 bytes, 0 came"),
        ({"data": bytes(389)}, "takes 1 to 388 bytes, 389 came"),
        ({"data": b"\0" * 30}, "is no codec ternary"),
        ({"data": bytes(4) + zlib.compress(bytes(99))}, "is no codec ternary: 99 of 160 elements"),
    ],
)
def test_what_is_not_of_the_codec_is_refused_before_memory_is_taken(
    change: dict[str, object], words: str
) -> None:
    codec = find_codec("ternary")()
    message = codec.encode(torch.randn(1, 5, 32), 0, 0)
    for name, value in change.items():
        setattr(message, name, value)

    with pytest.raises(TrunkError, match=words) as refused:
        codec.decode(message, "activations")
    assert len(str(refused.value)) < 300


@pytest.mark.usefixtures("stranger")
def test_a_bomb_unpacks_to_no_more_than_its_shape() -> None:
    codec = find_codec("ternary")()
    message = codec.encode(torch.randn(1, 5, 32), 0, 0)
    message.data = bytes(4) + zlib.compress(bytes(10**5), 9)
    assert codec.decode(message, "activations").shape == (1, 5, 32)


@pytest.mark.usefixtures("stranger")
def test_built_in_codecs_take_no_strangers_message() -> None:
    message = find_codec("ternary")().encode(H, 0, 0)
    with pytest.raises(TrunkError, match="ternary came, fp32 was agreed; start both sides"):
        find_codec("fp32")().decode(message, "gradient")
