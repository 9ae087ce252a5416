"""One client step, whatever drives it: its halves, and what it believes of the trunk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from conf.schema import TrainConfig
from flower_app.client import streamed
from flower_app.client.ends import Ends
from flower_app.client.step import Evaluation, Step
from models import client_state, split
from simulations.equality.local_link import LocalLink
from strategies.errors import TrunkError
from strategies.optim import ALONE
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import find_codec
from strategies.transport.codec.tensors import encode_named
from strategies.transport.frames import read_server_frame, server_frame
from strategies.transport.link import Framed, Request, StepCounters
from strategies.transport.payload import Parcel
from tests.strategies.helpers import (
    CUT,
    H,
    engine_for,
    largest_difference,
    link_config,
    place,
    random_steps,
    tiny_model,
)

TRAIN = TrainConfig(lr=1e-2, clip=1.0, accumulate=3)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """See `one_thread`."""


def fresh(dropout: float) -> PreTrainedModel:
    """Its embedding is tied to its head: the order in which gradients add up counts."""
    return tiny_model("gpt2", resid_pdrop=dropout)


def test_a_graph_that_was_dropped_is_made_again_alike() -> None:
    """What the messages transport does: the process that went forward is gone."""
    models = []
    for dropped in (False, True):
        model = fresh(0.2)
        parts = split(model, CUT)
        engine = engine_for(parts.trunk, TRAIN)
        engine.open_round(1, 1, training=True)
        link = LocalLink(engine.open("a", client="a", steps=1))
        ends = Ends(parts.bottom, parts.top, 1, TRAIN, place("a"))
        step = Step(ends, link, 0, random_steps(1, seed=5)[0])
        step.compute(0)
        if dropped:
            step.forget()
        step.computed(0, link.computed())
        grad_BTD, square = link.gradients()
        step.gradients(0, grad_BTD)
        step.apply(square)
        models.append(model)

    assert largest_difference(*models) == 0


def test_without_dropout_clients_of_one_process_do_not_wait_for_each_other() -> None:
    """Only who draws random numbers needs the process's generator to itself."""
    batch = random_steps(1, seed=5)[0][0]
    with ThreadPoolExecutor(2) as pool:
        with ALONE:
            free, waits = (
                pool.submit(ends_of(attention_dropout=p).up, 0, 0, batch) for p in (0.0, 0.2)
            )
            free.result(10.0)
            assert not waits.done()
        waits.result(10.0)


def ends_of(**changes: float) -> Ends:
    parts = split(tiny_model(**changes), CUT)
    return Ends(parts.bottom, parts.top, 1, TRAIN, place("a"))


class Told(Framed):
    """Keeps what is sent; what is read was made up."""

    def __init__(self) -> None:
        super().__init__(link_config(), 0)
        self.sent: list[Request] = []
        self.trunk_seconds = 0.0

    def send(self, request: Request) -> None:
        self.sent.append(request)


def answered(link: Told, parcel: Parcel | None = None, **body: object) -> Request:
    """The request that was sent, with this answer."""
    request = link.sent[0]
    request.take(read_server_frame(server_frame(parcel, **body)))  # type: ignore[arg-type]
    return request


@pytest.mark.parametrize(
    ("came", "word"),
    [
        (H[:1], r"came with shape \(1, 5, 32\), sent was \(2, 5, 32\)"),
        (H.transpose(0, 1), "came with shape"),
        (H.masked_fill(H > 2, float("nan")), r"step 3 holds values that are not finite"),
        (H.masked_fill(H > 2, float("inf")), r"step 3 holds values that are not finite"),
    ],
)
def test_what_the_trunk_sends_is_checked_before_it_counts(came: torch.Tensor, word: str) -> None:
    link = Told()
    link.compute(3, 0, H, None)
    parcel = Parcel()
    tensor = find_codec("fp32")().encode(came, None, 3, 0, parcel)

    with pytest.raises(TrunkError, match=word):
        body = pb.Activations(step=3, activations=tensor)
        link.read_activations(answered(link, parcel, activations=body))
    with pytest.raises(TrunkError, match=word):
        gradients = pb.Gradients(step=3, gradient=tensor)
        link.read_gradients(answered(link, parcel, gradients=gradients))


def test_a_step_is_not_believed_either() -> None:
    link, parcel = Told(), Parcel()
    link.compute(0, 0, H, None)
    state = encode_named({"lm_head": torch.tensor([float("nan")])}, parcel)

    with pytest.raises(TrunkError, match="'lm_head' after step 0 holds values that are not"):
        link.read_applied(answered(link, parcel, applied=pb.Applied(state=state, grad_norm=1.0)))
    with pytest.raises(TrunkError, match="gradient norm of step 0 is inf"):
        link.read_applied(answered(link, applied=pb.Applied(grad_norm=float("inf"))))
    with pytest.raises(TrunkError, match="square norm of -1"):
        link.read_gradients(answered(link, gradients=pb.Gradients(square_norm=-1.0)))


def test_ends_do_not_step_by_a_norm_that_is_none() -> None:
    """The trunk has found the same, and names it; until then nothing of a client has moved."""
    parts = split(tiny_model(), CUT)
    ends = Ends(parts.bottom, parts.top, 1, TRAIN, place("a"))
    link = Told()
    step = Step(ends, link, 0, random_steps(1, seed=5)[0])
    step.compute(0)
    step.computed(0, torch.ones(link.sent[0].shape))

    step.apply(float("inf"))

    assert [request.answer for request in link.sent] == ["activations", "gradients", "applied"]
    assert not ends.optimizer_state()


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1, 0), [0, 1]), ((2, 0), [0]), ((2, -1), [0, 1]), ((0,), [0]), ((1, 0), [10**6])],
)
def test_rows_that_the_ends_have_not_are_refused(shape: tuple[int, ...], rows: list[int]) -> None:
    """One row for several numbers would be copied into each."""
    parts = split(tiny_model(), CUT)
    ends = Ends(parts.bottom, parts.top, 1, TRAIN, place("a"))
    own = {n: t.clone() for n, t in client_state(parts.bottom, parts.top).items()}
    name = next(n for n, t in own.items() if t.dim() == 2)
    width = own[name].shape[1]
    came = torch.ones(*shape[:-1], width + shape[-1])

    with pytest.raises(ValueError, match=f"the server sends {len(rows)} rows of '{name}'"):
        ends.load({name: came}, {name: torch.tensor(rows)})
    assert all(torch.equal(own[n], t) for n, t in client_state(parts.bottom, parts.top).items())
    ends.load({name: torch.ones(2, width)}, {name: torch.tensor([0, 3])})
    assert client_state(parts.bottom, parts.top)[name][[0, 3]].eq(1).all()


def test_a_site_with_one_example_is_told_what_helps() -> None:
    parts = split(tiny_model(), CUT)

    with pytest.raises(ValueError, match=r"no held-out token .* one example .* data.heldout=0"):
        streamed.evaluate(parts.bottom, parts.top, Told(), [], TRAIN)  # type: ignore[arg-type]
    assert (
        Evaluation(parts.bottom, parts.top, Told(), TRAIN, total=3.0, tokens=2).outcome().loss
        == 1.5
    )


def test_counters_of_a_step_travel_as_they_are() -> None:
    link = Told()
    link.apply(4, StepCounters(client_square_norm=0.5, tokens=7, loss=1.5))

    assert (link.sent[0].answer, link.sent[0].step) == ("applied", 4)
