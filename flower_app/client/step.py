"""A client's share of one optimizer step, whichever way its frames go.

Each method is what a client does between two frames: it takes what came from the trunk, and sends
what follows from it through the link's sending halves. Who receives decides the order: `streamed`
waits for each answer, `messaged` has them all in one message.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from conf.schema import TrainConfig
from flower_app.client.defences.defence import say_place
from flower_app.client.ends import Clock, Ends, on_device, token_loss
from flower_app.data.client import Batch
from strategies.engine.lane import StepResult
from strategies.errors import TrunkError
from strategies.memory import MEGABYTE, peak_bytes
from strategies.optim import autocast
from strategies.transport.link import Sender, StepCounters

PHASES = ("bottom", "network", "trunk", "top")
"""Where a client's time goes."""


@dataclass(kw_only=True)
class Outcome:
    """What one session amounted to. `loss` is the mean over `tokens` tokens, in nats."""

    loss: float
    tokens: int
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase: `bottom`, `network`, `trunk`, `top`; over messages nobody knows the network's."""

    def counters(self, bytes_up: int, bytes_down: int) -> dict[str, int | float]:
        """What the server is told of it, and of this process."""
        return {
            **{f"seconds-{phase}": self.seconds.get(phase, 0.0) for phase in PHASES},
            "peak-memory-mb": peak_bytes() / MEGABYTE,
            "num-tokens": self.tokens,
            "loss": self.loss,
            "steps": self.steps,
            "bytes-up": bytes_up,
            "bytes-down": bytes_down,
        }


class Step:
    """One optimizer step of a client.

    Its loss is the mean over all tokens of its micro-batches, so that `accumulate=2` equals one
    batch of twice the size.

    Parameters
    ----------
    ends : Ends
        Bottom and top; their gradients add up in the order of the calls.
    link : Sender
        Takes the frames.
    number : int
        Of the step, from 0.
    batches : sequence of Batch
        Its micro-batches; none in a step of others (`train.global_batch`).
    total : float
        Loss, summed over tokens, of the micro-batches that an earlier process has had.

    Raises
    ------
    ValueError
        If no token counts.
    """

    def __init__(
        self, ends: Ends, link: Sender, number: int, batches: Sequence[Batch], *, total: float = 0.0
    ) -> None:
        self.number, self.total = number, total
        self.tokens = ends.count_tokens(number, batches)
        self.batches, self._ends, self._link = batches, ends, link
        self._h1_BTD: dict[int, Tensor] = {}

    @property
    def loss(self) -> float:
        """Mean over the step's tokens, in nats."""
        return self.total / max(1, self.tokens)

    def compute(self, micro: int) -> None:
        """Bottom's forward of a micro-batch; sends h1."""
        batch = self.batches[micro]
        h1_BTD = self._ends.up(self.number, micro, batch)
        self._h1_BTD[micro] = h1_BTD
        frozen = not self._ends.bottom_learns
        self._link.compute(
            self.number,
            micro,
            h1_BTD.detach(),
            self._ends.mask(batch),
            frozen=frozen,
            names=self._ends.names(batch),
        )

    def forget(self) -> None:
        """Drop bottom's graphs; those that are needed again are computed again, alike."""
        self._h1_BTD.clear()

    def computed(self, micro: int, h2_BTD: Tensor) -> None:
        """Top, loss, and back to the cut; sends dL/dh2."""
        batch, last = self.batches[micro], micro == len(self.batches) - 1
        loss, grad_BTD = self._ends.across(self.number, micro, batch, h2_BTD, self.tokens)
        self.total += loss
        self._link.backward(
            self.number, micro, grad_BTD, self._ends.mask(batch), last=last, tokens=self.tokens
        )
        # While the trunk goes back.
        self._ends.teach_bridge(self.number, micro, batch, self._h1_BTD.get(micro), h2_BTD)

    def gradients(self, micro: int, grad_BTD: Tensor | None) -> None:
        """Back through the bottom, with dL/dh1; there is none if the bottom learns nothing."""
        h1_BTD = self._h1_BTD.pop(micro, None)
        if not self._ends.bottom_learns:
            return
        if grad_BTD is None:
            raise TrunkError(
                f"the trunk sent no gradient of step {self.number}, micro-batch {micro}, and the "
                "bottom learns",
                kind="shape",
            )
        if h1_BTD is None:
            h1_BTD = self._ends.up(self.number, micro, self.batches[micro])
        self._ends.down(h1_BTD, grad_BTD, self.batches[micro], self.tokens)

    def apply(self, trunk_square: float, seconds_network: float = 0.0) -> None:
        """Ask for the trunk's optimizer step, and take the ends' own meanwhile.

        With `train.sync=step` the server takes it for them, and `applied` brings the result.

        Parameters
        ----------
        trunk_square : float
            Squared norm of the trunk's gradient, as the last micro-batch's answer has it.
        seconds_network : float
            Waited for answers, for the run's metrics.
        """
        ends = self._ends
        square = ends.square_norm() if self.batches else 0.0
        counters = StepCounters(
            client_square_norm=square,
            tokens=self.tokens,
            loss=self.loss,
            seconds_bottom=ends.clock.seconds["bottom"],
            seconds_network=seconds_network,
            seconds_top=ends.clock.seconds["top"],
        )
        common = ends.config.sync == "step"
        self._link.apply(self.number, counters, ends.gradients() if common and self.tokens else {})
        # A norm that is no number is the trunk's to name: it has found the same.
        if self.batches and not common and math.isfinite(trunk_square + square):
            ends.take_step(self.number, trunk_square + square)

    def applied(self, result: StepResult) -> None:
        """Take over what the trunk made of the step, if it did it for all."""
        if self._ends.config.sync == "step":
            self._ends.load(result.state, result.rows)


class Evaluation:
    """Loss over held-out batches, as sums over tokens; nothing is trained.

    Parameters
    ----------
    bottom, top : nn.Module
        Callable as the parts of `models.split`.
    link : Sender
        Takes the activations.
    config : TrainConfig
        Precision.
    total, tokens
        Of the batches that an earlier process has had.
    """

    def __init__(
        self,
        bottom: nn.Module,
        top: nn.Module,
        link: Sender,
        config: TrainConfig,
        *,
        total: float = 0.0,
        tokens: int = 0,
    ) -> None:
        self._bottom, self._top, self._link, self._config = bottom.eval(), top.eval(), link, config
        self._device = next(bottom.parameters()).device
        self.total, self.tokens, self.clock = total, tokens, Clock()

    @torch.no_grad()
    def compute(self, position: int, batch: Batch) -> None:
        """Bottom's forward; sends h1."""
        ids, mask, _ = on_device(self._device, batch)
        say_place(self._bottom, "evaluate", position)
        with self.clock("bottom"), autocast(self._device, self._config.precision):
            h1_BTD = self._bottom(ids, mask)
        self._link.compute(position, 0, h1_BTD, mask)

    @torch.no_grad()
    def computed(self, position: int, batch: Batch, h2_BTD: Tensor) -> None:
        """Top and loss; `ValueError` if it is not finite."""
        _, mask, labels = on_device(self._device, batch)
        with self.clock("top"), autocast(self._device, self._config.precision):
            loss, count = token_loss(self._top(h2_BTD.to(self._device), mask), labels)
        if not torch.isfinite(loss):
            raise ValueError(f"held-out batch {position} has a loss of {float(loss)}")
        self.total, self.tokens = self.total + float(loss), self.tokens + count

    def outcome(self) -> Outcome:
        """Mean loss per token; `ValueError` if there was nothing to evaluate on."""
        if self.tokens == 0:
            raise ValueError(
                "no held-out token to evaluate on: one example alone is trained on. Give this "
                "site more of them, raise data.heldout or data.max_examples, or set "
                "data.heldout=0, so that nobody evaluates"
            )
        return Outcome(loss=self.total / self.tokens, tokens=self.tokens)
