"""A client's session over a link that stays: several micro-batches are under way at once."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

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
    *,
    window: int = 1,
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
    window : int
        Micro-batches of a step that may be under way at once; with more than 1 a step's end and the
        next one's beginning are, too. The numbers are the same.

    Raises
    ------
    TrunkError
        When the trunk refuses, fails or falls silent.
    ValueError
        If a step has no token that counts.
    """
    trainer = Trainer(bottom, top, link, count, config, place, bridge, window=window)
    outcome = Outcome(loss=0.0, tokens=0)
    planned: Iterator[Sequence[Batch] | None] = itertools.chain(steps, [None])
    for step, (batches, following) in enumerate(itertools.pairwise(planned)):
        assert batches is not None
        loss, tokens = trainer.step(step, batches, following)
        outcome.losses.append(loss)
        outcome.loss += loss * tokens
        outcome.tokens += tokens
        outcome.steps += 1
    outcome.loss /= max(1, outcome.tokens)
    outcome.seconds = trainer.seconds
    return outcome


def evaluate(
    bottom: nn.Module,
    top: nn.Module,
    link: Link,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    window: int = 1,
) -> Outcome:
    """Mean loss per token over held-out batches, through a forward-only session.

    So many batches as `window` says are under way at once.

    Raises
    ------
    ValueError
        If no token counts, or a loss is not finite.
    """
    evaluation = Evaluation(bottom, top, link, config)
    started, before = time.perf_counter(), link.trunk_seconds
    ahead = iter(enumerate(batches))
    under_way: deque[tuple[int, Batch]] = deque()

    def send(most: int) -> None:
        for position, batch in itertools.islice(ahead, most):
            evaluation.compute(position, batch)
            under_way.append((position, batch))

    send(window)
    while under_way:
        position, batch = under_way.popleft()
        evaluation.computed(position, batch, link.computed())
        send(1)
    outcome, own = evaluation.outcome(), evaluation.clock.seconds
    outcome.seconds = by_phase(own, link.trunk_seconds - before, time.perf_counter() - started)
    return outcome


def by_phase(own: Mapping[str, float], trunk: float, elapsed: float) -> dict[str, float]:
    """Seconds by phase: what neither the ends nor the trunk used is the network's."""
    network = max(0.0, elapsed - sum(own.values()) - trunk)
    return {**own, "trunk": trunk, "network": network}


class Trainer:
    """One client's optimizer steps in one round; see `train` for the parameters.

    The order of frames depends on the window and the number of micro-batches alone: as many
    forwards as the window takes, then for each micro-batch its backward and the next forward.
    Answers are taken in the order of the frames, so gradients add up as they would one by one.
    """

    def __init__(
        self,
        bottom: nn.Module,
        top: nn.Module,
        link: Link,
        count: int,
        config: TrainConfig,
        place: Place,
        bridge: Regression | None = None,
        *,
        window: int = 1,
    ) -> None:
        self._ends, self._link = Ends(bottom, top, count, config, place, bridge), link
        self._window = window
        # With train.sync=step the next forward needs this step's answer.
        self._looks_ahead = window > 1 and config.sync != "step"
        self._due: deque[tuple[str, int]] = deque()
        """Answers of a step that have not been taken: which, and of which micro-batch."""
        self._begun: Step | None = None
        self._since, self._trunk_before = 0.0, 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def step(
        self, number: int, batches: Sequence[Batch], following: Sequence[Batch] | None = None
    ) -> tuple[float, int]:
        """Take one optimizer step in all three parts.

        Parameters
        ----------
        number : int
            From 0; each call takes the next.
        batches : sequence of Batch
            Its micro-batches.
        following : sequence of Batch, optional
            Those of the next step: its first forwards are sent before the answer to this step's end
            is waited for. The next call must be for that step.

        Returns
        -------
        loss : float
            Mean over the step's tokens, in nats.
        tokens : int
            How many count.
        """
        link = self._link
        if self._begun is None:
            self._restart()
        step, square = self._begun or self._begin(number, batches), 0.0
        self._begun = None
        while self._due:
            answer, micro = self._due.popleft()
            if answer == "activations":
                step.computed(micro, link.computed())
                self._due.append(("gradients", micro))
                if self._window > 1:
                    self._forward(step, micro + self._window)
            else:
                grad_BTD, square = link.gradients()
                step.gradients(micro, grad_BTD)
                if self._window == 1:
                    self._forward(step, micro + 1)
        # Zero would not be written, and the frame's length, which is counted, hang on the clock.
        step.apply(square, max(1e-9, self._spent()["network"]))
        self._count()
        if following is not None and self._looks_ahead:
            self._begun = self._begin(number + 1, following)
        step.applied(link.applied())
        if self._begun is None:
            self._count()
        return step.loss, step.tokens

    def _begin(self, number: int, batches: Sequence[Batch]) -> Step:
        """Send the first forwards of a step."""
        step = Step(self._ends, self._link, number, batches)
        for micro in range(self._window):
            self._forward(step, micro)
        return step

    def _forward(self, step: Step, micro: int) -> None:
        if micro < len(step.batches):
            step.compute(micro)
            self._due.append(("activations", micro))

    def _restart(self) -> None:
        self._since, self._trunk_before = time.perf_counter(), self._link.trunk_seconds
        self._ends.clock.reset()

    def _spent(self) -> dict[str, float]:
        """Seconds by phase since `_restart`."""
        trunk = self._link.trunk_seconds - self._trunk_before
        return by_phase(self._ends.clock.seconds, trunk, time.perf_counter() - self._since)

    def _count(self) -> None:
        for phase, seconds in self._spent().items():
            self.seconds[phase] += seconds
        self._restart()
