"""Whole sessions under the fuzzer: real engines, small enough for a thousand frames a second.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conf.schema import TrainConfig
from conf.sections.link import read_codecs
from models import Cut, split
from models.tiny import tiny_config
from simulations.disturb.inputs import LIMIT, NUMBERS, Inputs
from simulations.equality.fold import fold
from strategies.engine.checks import LARGEST
from strategies.engine.engine import TrunkEngine
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.cache import Cache
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import decode_mask
from strategies.transport.conversation import Conversation
from strategies.transport.frames import Frame, read_client_frame, read_server_frame
from strategies.transport.rows import from_bits, tokens_of

STEPS, MICROS, GRAPHS, IN_FLIGHT = 4, 3, 2, 2**12
"""Of a session: steps, micro-batches of a step, graphs that may wait, and bytes in flight."""

LONGEST_WORDS = 2000
"""Characters of a refusal; what a stranger sends must not fill logs."""

END_SHAPES = {"bottom.w": (3, 2), "top.b": (4,)}


class Wrong(AssertionError):
    """An input was neither answered rightly nor refused in words."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to serve a session."""

    strategy: str
    codec: str = "fp32"
    training: bool = True
    sync: str = "round"
    llama: bool = False
    cached: bool = False
    """Whether activations of examples are kept."""


CACHE = 600
"""Bytes of them: of some examples, not of all."""

KINDS = {
    "v1": Kind(strategy="splitfed-v1"),
    "v1-fp16": Kind(strategy="splitfed-v1", codec="fp16"),
    "v2": Kind(strategy="splitfed-v2"),
    "v2-bf16": Kind(strategy="splitfed-v2", codec="bf16"),
    "v2-int4": Kind(strategy="splitfed-v2", codec="int4"),
    "merged": Kind(strategy="merged"),
    "merged-int2": Kind(strategy="merged", codec="int2"),
    "merged-step": Kind(strategy="merged", sync="step"),
    "v1-cached": Kind(strategy="splitfed-v1", codec="int4", cached=True),
    "evaluation": Kind(strategy="splitfed-v1", codec="int6", training=False),
    "llama-v1": Kind(strategy="splitfed-v1", llama=True),
    "llama-merged": Kind(strategy="merged", llama=True),
}
"""Each with a one-layer trunk; `llama`: with the middle of a tiny LLaMA."""

OFTEN = [name for name in KINDS if not name.startswith("llama")] * 4 + ["llama-v1", "llama-merged"]


class OneLayer(nn.Module):
    """The least that can be called a trunk: it mixes tokens, heeds the mask, and can overflow."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, hidden)
        self.hidden_size = hidden

    def forward(self, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        h_BTD = h_BTD.to(self.inner.weight.dtype)
        kept = h_BTD if mask_BT is None else h_BTD * mask_BT[..., None]
        return h_BTD + torch.tanh(self.inner(h_BTD)) * kept.mean(1, keepdim=True)


@cache
def _parts(llama: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A trunk, and what its weights are at the beginning of every sequence."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk: nn.Module = OneLayer(8)
        if llama:
            model = AutoModelForCausalLM.from_config(tiny_config("llama"))
            trunk = split(model, Cut(bottom=1, top=1)).trunk
    return trunk, {name: value.clone() for name, value in trunk.state_dict().items()}


@dataclass
class Position:
    """Where the session is, as a client knows it from the answers."""

    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Of the micro-batches whose backward is due."""
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    """Which of their positions travel."""
    gone_back: set[int] = field(default_factory=set)
    tokens: int = 0
    ready: bool = False
    """The last micro-batch has gone back."""


class Sessions:
    """Sessions of one round, one after another, and what must hold of each.

    Parameters
    ----------
    kind : str
        Of `KINDS`.
    chance : random.Random
        What everything is drawn from.
    """

    def __init__(self, kind: str, chance: random.Random) -> None:
        self.kind, self._chance = KINDS[kind], chance
        self._trunk, first = _parts(self.kind.llama)
        self._trunk.load_state_dict(first)
        train = TrainConfig(
            strategy=self.kind.strategy,
            sync=self.kind.sync,
            accumulate=MICROS,
            clip=chance.choice((0.0, 1.0)),
            optimizer=chance.choice(("adamw", "sgd")),
            prox=0.1 if self.kind.strategy == "splitfed-v1" and chance.random() < 0.3 else 0.0,
        )
        self._codec = read_codecs(self.kind.codec)
        hidden: int = self._trunk.hidden_size  # type: ignore[assignment]
        self.engine = TrunkEngine(
            self._trunk,
            hidden_size=hidden,
            train=train,
            timeout=0.5,
            max_sequences=4,
            max_tokens=16,
            max_graphs=GRAPHS,
            max_in_flight=IN_FLIGHT,
        )
        if self.kind.sync == "step":
            self.engine.policy.start_ends({n: torch.zeros(s) for n, s in END_SHAPES.items()})
        self.engine.open_round(1, 1, training=self.kind.training, cohort=1)
        self._inputs = Inputs(chance, hidden=hidden, codec=self.kind.codec, ends=list(END_SHAPES))
        self._cache, self._inputs.named = None, 0.01
        if self.kind.cached:
            self._cache, self._inputs.named = Cache(CACHE), 0.8
        self._trained: dict[str, float] = {}
        self._opened = 0
        self._last = b""
        self._begin()

    def _begin(self) -> None:
        key = f"session-{self._opened}"
        self._opened += 1
        steps = STEPS if self.kind.training else 0
        self._session = self.engine.open(key, client=key, steps=steps)
        self._talk = Conversation(
            key, self._session, self._codec, lambda report: None, LIMIT, self._cache
        )
        self._at, self._dead = Position(), False
        self._inputs.number = 1

    def draw(self) -> bytes:
        """The next input: half of them right, so that the session comes somewhere."""
        if (self._dead or self._talk.closed) and self._chance.random() < 0.7:
            self._end_session()
            self._begin()
        chance, way = self._chance, self._chance.random()
        # A right frame in a wrong place now and then.
        right = self._right(chance.choice((0,) * 12 + (1, -1)))
        if way < 0.5:
            raw = right
        elif way < 0.6:
            raw = self._last  # it comes twice
        elif way < 0.75:
            raw = self._inputs.damaged(right, self._last)
        elif way < 0.97:
            micro = chance.choice([*self._at.shapes, 0, 1])
            raw = self._inputs.hostile(self._session.applied, micro)
        else:
            raw = self._inputs.noise()
        self._last = raw
        return raw

    def _right(self, away: int) -> bytes:
        """What an honest client could send here, or so many steps away from here."""
        at, chance, step = self._at, self._chance, max(0, self._session.applied + away)
        if not self.kind.training:
            return self._inputs.compute(step, 0)
        if at.ready:
            ends = END_SHAPES if self.kind.sync == "step" else {}
            return self._inputs.apply(step, max(1, at.tokens), ends)
        if self.kind.strategy == "merged" and not at.shapes and chance.random() < 0.1:
            return self._inputs.apply(step, 0, {}, chance.choice((0.0, *NUMBERS)))
        fresh = [m for m in range(MICROS) if m not in at.shapes and m not in at.gone_back]
        if fresh and (not at.shapes or (len(at.shapes) < GRAPHS and chance.random() < 0.4)):
            return self._inputs.compute(step, chance.choice(fresh))
        if not at.shapes:
            return self._inputs.compute(step, 0)
        # In the order of the forwards, which is merged's; a client may try another.
        micro = chance.choice([*[next(iter(at.shapes))] * 3, *at.shapes])
        last = len(at.shapes) == 1 and (not fresh or chance.random() < 0.5)
        tokens = at.tokens = at.tokens or 1
        shape, mask_BT = at.shapes[micro], at.masks[micro]
        return self._inputs.backward(step, micro, shape, mask_BT, last=last, tokens=tokens)

    def put(self, raw: bytes) -> str:
        """Give one input to the session and judge what comes of it.

        Returns
        -------
        str
            What it was answered with: a body's name, or the kind of the failure.

        Raises
        ------
        TrunkError
            It was refused, and the session with it.
        Wrong
            It should not have been answered so.
        """
        session, before = self._session, self._session.applied
        try:
            answer = read_server_frame(self._talk.answer(raw))
        except TrunkError:
            session.close()  # as the service does
            self._dead = True
            raise
        if answer.kind == "failure":
            failure = answer.head.failure
            check_words(failure.message)
            if session.applied != before:
                raise Wrong(f"a step was taken for a frame that failed: {failure.kind}")
            return failure.kind
        self._judge(read_client_frame(raw), answer.head, answer.kind, before)
        self._inputs.number += answer.head.number == self._inputs.number
        return answer.kind

    def _judge(
        self, asked: Frame[pb.ClientFrame], answer: pb.ServerFrame, body: str, before: int
    ) -> None:
        at, moved, frame = self._at, self._session.applied - before, asked.head
        if moved and body != "applied":
            raise Wrong(f"a step was taken, and {body} answered")
        if body == "activations":
            micro, tensor = frame.compute.micro, frame.compute.activations
            mask_BT = decode_mask(frame.compute.mask, tuple(tensor.shape[:2]))
            if micro not in at.shapes:
                self._check_numbers(asked, tensor, mask_BT)
            if self._cache:
                self._inputs.tags = [kept.tag for kept in self._cache.h2.values()]
                if (held := held_bytes(self._cache)) > CACHE:
                    raise Wrong(f"{held} bytes are kept of at most {CACHE}")
            if self.kind.training:
                at.shapes[micro] = tuple(answer.activations.activations.shape)
                at.masks[micro] = mask_BT
        elif body == "gradients" and asked.kind == "backward":
            micro = frame.backward.micro
            if micro in at.shapes:
                self._check_numbers(asked, frame.backward.gradient, at.masks[micro])
            at.shapes.pop(micro, None)
            at.gone_back.add(frame.backward.micro)
            at.ready |= frame.backward.last
        elif body == "applied":
            if moved not in (0, 1) or frame.apply.step != before - (not moved):
                raise Wrong(f"step {frame.apply.step} was applied when {before} was due")
            if moved:
                self._at = Position()
        if body == "closed" and self.engine.in_flight.bytes:
            raise Wrong(f"{self.engine.in_flight.bytes} bytes are in flight after a good-bye")

    def _check_numbers(
        self, asked: Frame[pb.ClientFrame], message: pb.Tensor, mask_BT: Tensor | None
    ) -> None:
        codec, sent_BT = crossings(self._codec, 0).h1, mask_BT
        if known := asked.head.compute.known:
            # These rows are only named, and were judged when they came.
            B, T, _ = message.shape
            sent_BT = tokens_of(mask_BT, B, T) & ~from_bits(known, B)[:, None]
            if not sent_BT.any():
                return
        tensor_BTD = codec.decode(message, sent_BT, asked.payload, "it")
        largest = float(tensor_BTD.float().abs().max())
        if not math.isfinite(largest):
            raise Wrong("values that are not finite were let in")
        if largest > LARGEST:
            raise Wrong(f"{largest:g} was let in")

    def _end_session(self) -> None:
        self._session.close()
        if left := self.engine.in_flight.bytes:
            raise Wrong(f"{left} bytes are in flight after all sessions have ended")
        if self._session.tokens and self.kind.training:  # who evaluates has no replica
            self._trained[self._talk.key] = float(self._session.tokens)

    def end(self) -> None:
        """Close the round; `Wrong` if the trunk, with what was trained, is not finite."""
        self._end_session()
        fold(self.engine, self._trained)
        for name, value in self._trunk.state_dict().items():
            if not torch.isfinite(value).all():
                raise Wrong(f"the trunk's {name} is not finite")


def held_bytes(cache: Cache) -> int:
    """What a cache holds."""
    return sum(h1_nD.nbytes for h1_nD in cache.h1.values()) + sum(
        kept.h2_nD.nbytes for kept in cache.h2.values()
    )


def check_words(message: str) -> None:
    """`Wrong` unless a refusal says something, and not too much."""
    if not message.strip() or len(message) > LONGEST_WORDS:
        raise Wrong(f"a refusal of {len(message)} characters: {message[:200]!r}")
