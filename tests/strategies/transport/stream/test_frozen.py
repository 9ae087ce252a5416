"""What learns nothing gets no gradient, and none travels for it."""

from __future__ import annotations

import pytest
import torch

from conf.schema import TrainConfig
from flower_app.client import streamed
from flower_app.client.ends import Ends
from flower_app.client.step import Step
from models import Part, split
from simulations.equality.fold import fold
from simulations.equality.local_link import LocalLink
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import Frame, read_client_frame, read_server_frame
from strategies.transport.stream.channel import Stream
from tests.strategies.helpers import (
    CUT,
    connect,
    engine_for,
    largest_difference,
    place,
    random_steps,
    served,
    tiny_model,
    train_whole,
    twin,
)

TRAIN = TrainConfig(optimizer="sgd", lr=0.1, accumulate=2, clip=0.5)


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(
    ("frozen", "way_up", "way_down"),
    [((), True, True), (("bottom",), True, False), (("bottom", "trunk"), False, False)],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else str(value),
)
def test_no_gradient_travels_that_nobody_needs(
    frozen: tuple[str, ...],
    way_up: bool,
    way_down: bool,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what does learn ends as it does in the unsplit model."""
    model = tiny_model(tie_word_embeddings=False)
    parts = split(model, CUT)
    for name in frozen:
        part: Part = getattr(parts, name)
        part.requires_grad_(False)
    whole, before = twin(model), twin(model)
    steps = random_steps(3, seed=4, accumulate=2)
    up: list[Frame[pb.ClientFrame]] = []
    down: list[Frame[pb.ServerFrame]] = []
    send, receive = Stream.send, Stream.receive

    def watched(self: Stream, timeout: float) -> bytes | None:
        raw = receive(self, timeout)
        if raw is not None:
            down.append(read_server_frame(raw))
        return raw

    monkeypatch.setattr(
        Stream, "send", lambda self, raw: (up.append(read_client_frame(raw)), send(self, raw))
    )
    monkeypatch.setattr(Stream, "receive", watched)
    engine = engine_for(parts.trunk, TRAIN)
    engine.open_round(1, 1, training=True)
    with served(engine) as service:
        link = connect(service, "a", 3)
        streamed.train(parts.bottom, parts.top, link, steps, 3, TRAIN, place("a"), window=window)
        link.close()
    fold(engine, {"a": 1.0})
    train_whole(whole, steps, TRAIN)

    assert largest_difference(model, whole) <= 1e-5
    assert largest_difference(model, before) > 1e-3
    backwards = [each.head.backward for each in up if each.kind == "backward"]
    gradients = [each.head.gradients for each in down if each.kind == "gradients"]
    assert len(backwards) == len(gradients) == 6
    assert {each.HasField("gradient") for each in backwards} == {way_up}
    assert {each.HasField("gradient") for each in gradients} == {way_down}


def test_a_bottom_that_learns_does_not_go_without_its_gradient() -> None:
    """As it would if the trunk took the client for one whose bottom is frozen."""
    parts = split(tiny_model(), CUT)
    engine = engine_for(parts.trunk, TRAIN)
    engine.open_round(1, 1, training=True)
    link = LocalLink(engine.open("a", client="a", steps=1))
    ends = Ends(parts.bottom, parts.top, 1, TRAIN, place("a"))
    step = Step(ends, link, 0, random_steps(1, seed=5)[0])
    step.compute(0)
    step.computed(0, link.computed())
    with pytest.raises(TrunkError, match="sent no gradient of step 0, micro-batch 0, and the bott"):
        step.gradients(0, None)
    assert torch.is_tensor(link.gradients()[0])
