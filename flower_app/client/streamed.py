"""A client's side of training and evaluation, free of Flower and of any transport.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from conf.schema import TrainConfig
from flower_app.client.ends import Ends, Place, on_device, token_loss
from flower_app.data.client import Batch
from strategies.optim import autocast
from strategies.transport.link import Link, StepCounters

__all__ = ["Outcome", "Place", "Trainer", "evaluate", "token_loss", "train"]


@dataclass(kw_only=True)
class Outcome:
    """What one session amounted to. `loss` is the mean over `tokens` tokens, in nats."""

    loss: float
    tokens: int
    steps: int = 0
    losses: list[float] = field(default_factory=list)


def train(
    bottom: nn.Module,
    top: nn.Module,
    link: Link,
    steps: Iterable[Sequence[Batch]],
    count: int,
    config: TrainConfig,
    place: Place,
) -> Outcome:
    """Train bottom and top for one round, the trunk at the other end of the link with them.

    Each optimizer step minimises the mean loss over all tokens of its micro-batches, so that
    `accumulate=2` equals one batch of twice the size.

    Parameters
    ----------
    bottom, top : nn.Module
        Callable as the parts of `models.split`; their trainable parameters move in place.
    link : Link
        The open session.
    steps : iterable of sequences of Batch
        The micro-batches of each optimizer step.
    count : int
        How many steps there are, for the schedule.
    config : TrainConfig
        Optimizer, schedule, clipping, precision.
    place : Place
        Seeds of dropout, and the round.

    Raises
    ------
    TrunkError
        When the trunk refuses, fails or falls silent.
    ValueError
        If a step has no token that counts.
    """
    trainer = Trainer(bottom, top, link, count, config, place)
    outcome = Outcome(loss=0.0, tokens=0)
    for step, batches in enumerate(steps):
        loss, tokens = trainer.step(step, batches)
        outcome.losses.append(loss)
        outcome.loss += loss * tokens
        outcome.tokens += tokens
        outcome.steps += 1
    outcome.loss /= max(1, outcome.tokens)
    return outcome


@torch.no_grad()
def evaluate(
    bottom: nn.Module, top: nn.Module, link: Link, batches: Iterable[Batch], config: TrainConfig
) -> Outcome:
    """Mean loss per token over held-out batches, through a forward-only session.

    Raises
    ------
    ValueError
        If no token counts, or a loss is not finite.
    """
    bottom.eval()
    top.eval()
    total, tokens = 0.0, 0
    for position, batch in enumerate(batches):
        device = next(bottom.parameters()).device
        ids, mask, labels = on_device(device, batch)
        with autocast(device, config.precision):
            h2_BTD = link.compute(position, 0, bottom(ids, mask), mask)
            loss, count = token_loss(top(h2_BTD, mask), labels)
        if not torch.isfinite(loss):
            raise ValueError(f"held-out batch {position} has a loss of {float(loss)}")
        total, tokens = total + float(loss), tokens + count
    if tokens == 0:
        raise ValueError(
            "no held-out token to evaluate on; raise data.heldout or data.max_examples"
        )
    return Outcome(loss=total / tokens, tokens=tokens)


class Trainer:
    """One client's optimizer steps in one round; see `train` for the parameters."""

    def __init__(
        self,
        bottom: nn.Module,
        top: nn.Module,
        link: Link,
        count: int,
        config: TrainConfig,
        place: Place,
    ) -> None:
        self._ends = Ends(bottom, top, count, config, place)
        self._link, self._config = link, config

    def step(self, step: int, batches: Sequence[Batch]) -> tuple[float, int]:
        """Take one optimizer step in all three parts; returns its mean loss and its tokens."""
        ends, link = self._ends, self._link
        ends.clock.reset()
        trunk_before = link.trunk_seconds
        tokens = ends.count_tokens(step, batches)
        total = trunk_square = 0.0
        for micro, batch in enumerate(batches):
            h1_BTD = ends.up(step, micro, batch)
            with ends.clock("network"):
                h2_BTD = link.compute(step, micro, h1_BTD.detach(), ends.mask(batch))
            loss, grad_BTD = ends.across(step, micro, batch, h2_BTD, tokens)
            total += loss
            last = micro == len(batches) - 1
            with ends.clock("network"):
                grad_BTD, trunk_square = link.backward(
                    step, micro, grad_BTD, last=last, tokens=tokens
                )
            ends.down(h1_BTD, grad_BTD)
        square = ends.square_norm() if batches else 0.0
        # What the trunk used of the waiting is its own time, not the network's.
        network = ends.clock.seconds["network"] - (link.trunk_seconds - trunk_before)
        counters = StepCounters(
            client_square_norm=square,
            tokens=tokens,
            loss=total / max(1, tokens),
            seconds_bottom=ends.clock.seconds["bottom"],
            seconds_network=max(0.0, network),
            seconds_top=ends.clock.seconds["top"],
        )
        if self._config.sync == "step":
            link.apply(step, counters, ends.gradients() if tokens else {})
            ends.load(link.applied().state)
        else:
            link.apply(step, counters)  # the trunk steps while this client does
            if not math.isfinite(trunk_square + square):
                link.applied()  # the trunk found the same, and says so
            if batches:
                ends.take_step(step, trunk_square + square)
            link.applied()
        return counters.loss, tokens
