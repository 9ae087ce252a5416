"""A session's real frames, both ways, in this process: what they weigh, and what is held meanwhile.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conf.schema import Config, LinkConfig
from simulations.plan.rehearsal import STEPS, alone
from strategies.engine.engine import TrunkEngine
from strategies.engine.lane import StepResult
from strategies.transport.cache import Cache
from strategies.transport.conversation import Conversation
from strategies.transport.frames import read_server_frame, refuse_failure
from strategies.transport.link import Framed, Request, StepCounters


class FramedLink(Framed):
    """A link whose frames are answered at once, by the trunk's own code.

    Parameters
    ----------
    config : LinkConfig
        Names the codec.
    talk : Conversation
        Answers.
    cache : Cache, optional
        Of the client's examples.
    across : callable
        Wraps the trunk's work: `across(frame, answer)` calls `answer(frame)`.
    """

    def __init__(
        self,
        config: LinkConfig,
        talk: Conversation,
        cache: Cache | None = None,
        across: Callable[[bytes, Callable[[bytes], bytes]], bytes] = lambda raw, answer: answer(
            raw
        ),
    ) -> None:
        super().__init__(config, talk.session.codec_seed, cache)
        self._talk, self._across = talk, across
        self._asked: list[Request] = []
        self.bytes_up = self.bytes_down = 0
        self.trunk_seconds = 0.0

    def send(self, request: Request) -> None:
        raw = self._across(request.raw, self._talk.answer)
        self.bytes_up += len(request.raw)
        self.bytes_down += len(raw)
        request.take(refuse_failure(read_server_frame(raw)))
        self._asked.append(request)

    def computed(self) -> Tensor:
        """The trunk's output."""
        return self.read_activations(self._answered())

    def gradients(self) -> tuple[Tensor | None, float]:
        """dL/dh1, and the squared norm of the trunk's gradient."""
        return self.read_gradients(self._answered())

    def applied(self) -> StepResult:
        """The trunk's step."""
        return self.read_applied(self._answered())

    def _answered(self) -> Request:
        request = self._asked.pop(0)
        self.taken += 1
        self.trunk_seconds += request.reply.seconds
        return request

    def close(self) -> None:
        """The engine's round ends without a good-bye."""


@dataclass(frozen=True, kw_only=True)
class StepFrames:
    """One optimizer step on the wire."""

    up: int
    down: int
    """Bytes of frames."""
    crossings: tuple[int, int, int, int]
    """Bytes of a micro-batch's frames with h1, h2, dL/dh2 and dL/dh1."""
    largest: int
    """Bytes of the largest one."""
    seconds: float
    """Of this machine, to make frames of tensors and tensors of frames, on both sides together."""


SMALL = 2**22
"""Elements of a tensor that is sent more than once."""


class _Echo(nn.Module):
    """A trunk that only hands on."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=learns)

    def forward(self, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        return h_BTD * self.scale


def step_frames(
    config: Config, width: int, *, bottom_learns: bool = True, trunk_learns: bool = True
) -> StepFrames:
    """Send the frames of a step, of random numbers, and weigh them.

    Parameters
    ----------
    config : Config
        Codec, batch, accumulation.
    width : int
        D.
    bottom_learns, trunk_learns : bool
        Gradients that nobody needs do not travel.
    """
    rows, tokens = config.train.batch_size, config.data.context
    shape = (rows, tokens, width)
    own: list[float] = []
    sizes: list[int] = []

    def across(raw: bytes, answer: Callable[[bytes], bytes]) -> bytes:
        reply = answer(raw)
        sizes.extend((len(raw), len(reply)))
        return reply

    link = FramedLink(config.link, open_session(_Echo(trunk_learns), config, width), across=across)
    micros = config.train.accumulate
    h_BTD = torch.randn(shape)
    attempts = 3 if h_BTD.numel() < SMALL else 1  # the first one warms up
    for attempt in range(attempts):
        before, started = (link.bytes_up, link.bytes_down), time.process_time()
        _send_step(link, attempt, h_BTD, micros, frozen=not bottom_learns)
        own.append(time.process_time() - started)
    return StepFrames(
        up=link.bytes_up - before[0],
        down=link.bytes_down - before[1],
        crossings=(sizes[0], sizes[1], sizes[2], sizes[3]),
        largest=max(sizes),
        seconds=min(own),
    )


def _send_step(link: FramedLink, number: int, h_BTD: Tensor, micros: int, *, frozen: bool) -> None:
    tokens = h_BTD.shape[0] * (h_BTD.shape[1] - 1) * micros
    for micro in range(micros):
        link.compute(number, micro, h_BTD, None, frozen=frozen)
        link.computed()
        link.backward(number, micro, h_BTD, None, last=micro == micros - 1, tokens=tokens)
        link.gradients()
    counters = StepCounters(
        client_square_norm=1.0,
        tokens=tokens,
        loss=1.0,
        seconds_bottom=1.0,
        seconds_network=1.0,
        seconds_top=1.0,
    )
    link.apply(number, counters)
    link.applied()


def open_session(trunk: nn.Module, config: Config, width: int) -> Conversation:
    """A conversation with a trunk, in a training round of one client."""
    engine = TrunkEngine(trunk, hidden_size=width, train=alone(config.train), max_in_flight=2**62)
    engine.open_round(1, 1, training=True)
    session = engine.open("plan", client="plan", steps=STEPS)
    return Conversation("plan", session, config.link.codec, lambda report: None, 2**62)
