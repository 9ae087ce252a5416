"""What the strategy tests share: tiny models, batches, links, and plain unsplit training."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.schema import LinkConfig, TrainConfig
from conf.sections.link import read_codecs
from flower_app.client import streamed
from flower_app.client.place import Place
from flower_app.client.step import Outcome
from flower_app.data.client import Batch
from models import Cut, split
from models.tiny import VOCAB, tiny_config
from simulations.equality.fold import fold
from simulations.equality.local_link import LocalLink
from simulations.equality.reference import fed_avg_round, train_whole
from strategies.engine.engine import TrunkEngine
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import find_codec
from strategies.transport.codec.tensors import encode_mask, encode_named
from strategies.transport.frames import client_frame, read_server_frame, refuse_failure
from strategies.transport.link import Link
from strategies.transport.payload import Parcel
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket, new_key, public_half

__all__ = ["fed_avg_round", "train_whole"]
"""Imported from here by the tests."""

HIDDEN = 32
CUT = Cut(bottom=1, top=1)
H = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
"""Activations (B, T, D)."""


def tiny_model(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random four-block model without dropout, in evaluation mode."""
    if family == "gpt2":
        changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()


def random_batch(seed: int, sequences: int = 3, tokens: int = 10, padding: str = "") -> Batch:
    """Random ids; padding on one side masks a different number of tokens in each sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (sequences, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(sequences if padding else 0):
        span = slice(tokens - row - 1, None) if padding == "right" else slice(0, row + 1)
        mask[row, span] = 0
    # Nothing is predicted from padding, which does not travel.
    learned = mask * torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    labels = torch.where(learned.bool(), ids, -100)
    return Batch(input_ids=torch.where(mask.bool(), ids, 0), attention_mask=mask, labels=labels)


def random_steps(
    count: int, *, seed: int, accumulate: int = 1, padding: str = "right"
) -> list[list[Batch]]:
    """Micro-batches of unequal size for `count` steps."""
    return [
        [
            random_batch(seed + 100 * s + m, 2 + (s + m) % 2, 8 + m, padding)
            for m in range(accumulate)
        ]
        for s in range(count)
    ]


def place(client: str = "client-0", round: int = 1, rounds: int = 1) -> Place:
    """Where a test's client is."""
    return Place(seed=0, client=client, round=round, rounds=rounds)


def engine_for(trunk: torch.nn.Module, train: TrainConfig, **kwargs: object) -> TrunkEngine:
    """An engine over a tiny trunk."""
    return TrunkEngine(trunk, hidden_size=HIDDEN, train=train, **kwargs)  # type: ignore[arg-type]


def open_engine(*, training: bool = True, **train: object) -> TrunkEngine:
    """An engine over a tiny model's trunk, with a round open."""
    engine = engine_for(split(tiny_model(), CUT).trunk, TrainConfig(**train))  # type: ignore[arg-type]
    engine.open_round(1, 1, training=training)
    return engine


@contextmanager
def served(engine: TrunkEngine, **link: object) -> Iterator[TrunkService]:
    """The engine behind real gRPC on loopback."""
    service = TrunkService(engine, link_config(**link))
    service.start()
    try:
        yield service
    finally:
        service.stop()


NODE_KEY = new_key()
"""Of every node in these tests."""


def admit(service: TrunkService, key: str) -> Ticket:
    """A ticket to session `key`, for whoever holds `NODE_KEY`."""
    return service.ticket(Guest(key=key, client=key, public_key=public_half(NODE_KEY)))


def link_config(**link: object) -> LinkConfig:
    """Settings of a link, with a grace that fits its timeout."""
    timeout = float(link.get("timeout", 120.0))  # type: ignore[arg-type]
    return LinkConfig(**{"grace": min(30.0, timeout / 2), **link})  # type: ignore[arg-type]


def connect(service: TrunkService, key: str, steps: int, **link: object) -> GrpcLink:
    """A link with a fresh ticket for session `key`."""
    return GrpcLink(admit(service, key), NODE_KEY, steps=steps, config=link_config(**link))


def all_in(codec: str) -> dict[str, Any]:
    """One codec for all crossings."""
    return read_codecs(codec)


def compute_frame(
    h_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    codec: str = "fp32",
    number: int = 1,
    seen: int = 0,
    **fields: Any,
) -> bytes:
    """A `Compute` frame; other fields may spoil it."""
    parcel = Parcel()
    h1 = find_codec(codec)().encode(h_BTD, mask_BT, 0, 0, parcel)
    body = {"activations": h1, "mask": encode_mask(mask_BT)} | fields
    return client_frame(parcel, number=number, seen=seen, compute=pb.Compute(**body))


def backward_frame(
    grad_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    codec: str = "fp32",
    number: int = 1,
    seen: int = 0,
    **fields: Any,
) -> bytes:
    """A `Backward` frame."""
    parcel = Parcel()
    gradient = find_codec(codec)().encode(grad_BTD, mask_BT, 0, 0, parcel)
    body = pb.Backward(gradient=gradient, **fields)
    return client_frame(parcel, number=number, seen=seen, backward=body)


def apply_frame(
    gradients: dict[str, torch.Tensor] | None = None,
    *,
    number: int = 1,
    seen: int = 0,
    **fields: Any,
) -> bytes:
    """An `Apply` frame, with gradients of the ends."""
    parcel = Parcel()
    named = encode_named(gradients or {}, parcel)
    body = pb.Apply(gradients=named, **fields)
    return client_frame(parcel, number=number, seen=seen, apply=body)


def forward(
    link: Link, step: int, micro: int, h_BTD: torch.Tensor, mask_BT: torch.Tensor | None
) -> torch.Tensor:
    """Both halves of a forward."""
    link.compute(step, micro, h_BTD, mask_BT)
    return link.computed()


def back(
    link: Link, step: int, micro: int, grad_BTD: torch.Tensor, *, last: bool, tokens: int = 0
) -> tuple[torch.Tensor, float]:
    """Both halves of a backward of a micro-batch without padding."""
    link.backward(step, micro, grad_BTD, None, last=last, tokens=tokens)
    return link.gradients()


def get_gradients(link: GrpcLink, number: int) -> pb.Gradients:
    """What the trunk answers to a question for the gradient that a frame should have brought."""
    link._connection.send(client_frame(get_gradients=pb.GetGradients(), number=number))
    raw = link._connection.receive(10.0)
    assert raw is not None
    return refuse_failure(read_server_frame(raw)).head.gradients


def train_split(
    model: PreTrainedModel,
    steps: Sequence[Sequence[Batch]],
    train: TrainConfig,
    cut: Cut = CUT,
) -> Outcome:
    """One client, one round, in this process; `model` shares its weights with its parts."""
    parts = split(model, cut)
    engine = engine_for(parts.trunk, train)
    engine.open_round(1, 1, training=True)
    link = LocalLink(engine.open("one", client="client-0", steps=len(steps)))
    outcome = streamed.train(parts.bottom, parts.top, link, steps, len(steps), train, place())
    fold(engine, {"one": outcome.tokens})
    return outcome


def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Largest absolute difference of two models' parameters, name by name."""
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).detach().abs().max()) for n in left)


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """An independent copy."""
    return copy.deepcopy(model)
