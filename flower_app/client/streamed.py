"""A client's session over a link that stays: it waits for each answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from conf.schema import TrainConfig
from flower_app.client.ends import Ends
from flower_app.client.place import Place
from flower_app.client.step import PHASES, Evaluation, Outcome, Step
from flower_app.data.client import Batch
from models.bridge import Regression
from strategies.transport.link import Link


def train(
    bottom: nn.Module,
    top: nn.Module,
    link: Link,
    steps: Iterable[Sequence[Batch]],
    count: int,
    config: TrainConfig,
    place: Place,
    bridge: Regression | None = None,
) -> Outcome:
    """Train bottom and top for one round, the trunk at the other end of the link with them.

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
    bridge : Regression, optional
        Learns beside them.

    Raises
    ------
    TrunkError
        When the trunk refuses, fails or falls silent.
    ValueError
        If a step has no token that counts.
    """
    trainer = Trainer(bottom, top, link, count, config, place, bridge)
    outcome = Outcome(loss=0.0, tokens=0)
    for step, batches in enumerate(steps):
        loss, tokens = trainer.step(step, batches)
        outcome.losses.append(loss)
        outcome.loss += loss * tokens
        outcome.tokens += tokens
        outcome.steps += 1
    outcome.loss /= max(1, outcome.tokens)
    outcome.seconds = trainer.seconds
    return outcome


def evaluate(
    bottom: nn.Module, top: nn.Module, link: Link, batches: Iterable[Batch], config: TrainConfig
) -> Outcome:
    """Mean loss per token over held-out batches, through a forward-only session.

    Raises
    ------
    ValueError
        If no token counts, or a loss is not finite.
    """
    evaluation = Evaluation(bottom, top, link, config)
    started, before = time.perf_counter(), link.trunk_seconds
    for position, batch in enumerate(batches):
        evaluation.compute(position, batch)
        evaluation.computed(position, batch, link.computed())
    outcome, own = evaluation.outcome(), evaluation.clock.seconds
    outcome.seconds = by_phase(own, link.trunk_seconds - before, time.perf_counter() - started)
    return outcome


def by_phase(own: Mapping[str, float], trunk: float, elapsed: float) -> dict[str, float]:
    """Seconds by phase: what neither the ends nor the trunk used is the network's."""
    network = max(0.0, elapsed - sum(own.values()) - trunk)
    return {**own, "trunk": trunk, "network": network}


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
        bridge: Regression | None = None,
    ) -> None:
        self._ends, self._link = Ends(bottom, top, count, config, place, bridge), link
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def step(self, number: int, batches: Sequence[Batch]) -> tuple[float, int]:
        """Take one optimizer step in all three parts; returns its mean loss and its tokens."""
        link, clock = self._link, self._ends.clock
        clock.reset()
        started, trunk_before, square = time.perf_counter(), link.trunk_seconds, 0.0
        step = Step(self._ends, link, number, batches)
        for micro in range(len(batches)):
            step.compute(micro)
            step.computed(micro, link.computed())
            grad_BTD, square = link.gradients()
            step.gradients(micro, grad_BTD)
        elapsed = time.perf_counter() - started
        spent = by_phase(clock.seconds, link.trunk_seconds - trunk_before, elapsed)
        # Zero would not be written, and the frame's length, which is counted, hang on the clock.
        step.apply(square, max(1e-9, spent["network"]))
        step.applied(link.applied())
        spent = by_phase(
            clock.seconds, link.trunk_seconds - trunk_before, time.perf_counter() - started
        )
        for phase, seconds in spent.items():
            self.seconds[phase] += seconds
        return step.loss, step.tokens
