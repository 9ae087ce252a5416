"""Sessions of generation under the fuzzer: a real engine, with little memory.

Shapes: B rows, L positions that are cached, T new ones, D hidden size.
"""

from __future__ import annotations

import random
from functools import cache

import torch
from transformers import AutoModelForCausalLM

from conf.sections.link import read_codecs
from models import Cut, split
from models.tiny import tiny_config
from simulations.disturb.inputs import LIMIT, Inputs
from simulations.disturb.sessions import Wrong, check_words
from strategies.engine.meter import SILENT
from strategies.errors import TrunkError
from strategies.generation.engine import GenerationEngine
from strategies.generation.memory import Limits
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import decode_mask
from strategies.transport.frames import Frame, read_client_frame, read_server_frame
from strategies.transport.generating import Generating

TARGET = "generation"
"""How the fuzzer's report calls it."""

LIMITS = Limits(total_mb=0.1, session_mb=0.05, rows=4, tokens=8, length=64, idle=0.0)


@cache
def _engine() -> GenerationEngine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    return GenerationEngine(split(model, Cut(bottom=1, top=1)).trunk, LIMITS, threads=1)


class Generations:
    """Sessions of one client, one after another, and what must hold of each.

    Parameters
    ----------
    chance : random.Random
        What everything is drawn from.
    """

    def __init__(self, chance: random.Random) -> None:
        self._chance, self._engine = chance, _engine()
        hidden = self._engine.hidden_size
        self._inputs = Inputs(chance, hidden=hidden, codec="fp32")
        self._talks: list[Generating] = []
        self._last = b""
        self._begin()

    def _begin(self) -> None:
        name = f"one/{len(self._talks)}"
        self._talk = Generating(
            name, self._engine, codec=read_codecs("fp32"), limit=LIMIT, meter=SILENT
        )
        self._talks.append(self._talk)
        self._rows = self._length = self._number = 0

    def draw(self) -> bytes:
        """The next input: half of them right, so that the session comes somewhere."""
        chance, way = self._chance, self._chance.random()
        if (self._talk.ended and chance.random() < 0.7) or way < 0.03:
            self._begin()
        right = self._right()
        if way < 0.55:
            raw = right
        elif way < 0.62:
            raw = self._last  # it comes twice
        elif way < 0.75:
            raw = self._inputs.damaged(right, self._last)
        elif way < 0.97:
            raw = self._inputs.hostile(self._number, self._length)
        else:
            raw = self._inputs.noise()
        self._last = raw
        return raw

    def _right(self) -> bytes:
        """What an honest client could send here."""
        chance, fork = self._chance, ""
        others = [each for each in self._talks[:-1] if not each.ended]
        if self._number == 0 and others and chance.random() < 0.5:
            fork = chance.choice(others).key
        length = chance.choice((self._length, self._length, chance.randint(0, self._length)))
        rows = []
        if length and chance.random() < 0.3:
            rows = [chance.randrange(self._rows) for _ in range(chance.randint(1, 3))]
        B = len(rows) or (self._rows if length else chance.randint(1, 3))
        return self._inputs.generate(
            self._number + 1,
            (B, chance.choice((1, 1, 2, 5))),
            length=length,
            rows=rows,
            fork=fork,
            drop=not length and chance.random() < 0.1,
        )

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
        try:
            answer = read_server_frame(self._talk.answer(raw))
        except TrunkError:
            self._talk.end()  # as the service does
            raise
        if answer.kind == "failure":
            check_words(answer.head.failure.message)
            return answer.head.failure.kind
        if answer.kind == "generated":
            self._judge(read_client_frame(raw).head.generate, answer)
        return answer.kind

    def _judge(self, asked: pb.Generate, answer: Frame[pb.ServerFrame]) -> None:
        got = answer.head.generated
        if got.number != asked.number or asked.number not in (self._number, self._number + 1):
            raise Wrong(f"frame {asked.number} was answered with {got.number} after {self._number}")
        if list(got.activations.shape) != list(asked.activations.shape):
            raise Wrong(f"{asked.activations.shape} came, {got.activations.shape} went")
        mask_BT = decode_mask(asked.mask, tuple(got.activations.shape[:2]))
        h_BTD = self._inputs.codec.decode(got.activations, mask_BT, answer.payload, "it")
        if not torch.isfinite(h_BTD).all():
            raise Wrong("values that are not finite were sent")
        if asked.number == self._number + 1 and not asked.drop:
            self._rows = asked.activations.shape[0]
            self._length = asked.length + asked.activations.shape[1]
        self._number = asked.number
        if (held := self._engine.memory.bytes) > LIMITS.total_mb * 2**20:
            raise Wrong(f"{held} bytes are cached")

    def end(self) -> None:
        """End all sessions; `Wrong` if memory is still taken."""
        for talk in self._talks:
            talk.end()
        if left := self._engine.memory.bytes:
            raise Wrong(f"{left} bytes are cached after all sessions have ended")
