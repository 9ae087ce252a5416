"""When each piece of a step happens: the client's order of work, a network, a trunk."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

STEPS = 4
"""Steps that are followed, until each takes as long as the one before."""


@dataclass(frozen=True, kw_only=True)
class Legs:
    """Seconds of one micro-batch in each part, of the optimizer steps, and of what is sent."""

    rising: float
    """The bottom's forward."""
    across: float
    """The top, there and back."""
    back: float
    """The bottom's backward."""
    forward: float
    backward: float
    """The trunk's."""
    client_step: float
    trunk_step: float
    h1: float = 0.0
    grad_h2: float = 0.0
    h2: float = 0.0
    grad_h1: float = 0.0
    """Of the bytes of each crossing on its way."""
    frame: float = 0.0
    """To make a frame of a tensor, or a tensor of a frame."""
    latency: float = 0.0
    """One way."""


@dataclass
class _Run:
    """Where everybody is: seconds at which client, trunk and either way are free."""

    legs: Legs
    client: float = 0.0
    trunk: float = 0.0
    up: float = 0.0
    down: float = 0.0
    answers: dict[str, deque[float]] = field(
        default_factory=lambda: {kind: deque() for kind in ("activations", "gradients", "applied")}
    )

    def ask(self, kind: str, sent: float, work: float, came: float) -> None:
        """The client sends; the trunk works on one frame after another, in their order."""
        self.up = max(self.up, self.client) + sent
        self.trunk = max(self.trunk, self.up + self.legs.latency) + work
        self.down = max(self.down, self.trunk) + came
        self.answers[kind].append(self.down + self.legs.latency)

    def wait(self, kind: str) -> None:
        """The client waits for its oldest answer of a kind."""
        self.client = max(self.client, self.answers[kind].popleft())

    def compute(self) -> None:
        legs = self.legs
        self.client += legs.rising + legs.frame
        self.ask("activations", legs.h1, legs.forward + 2 * legs.frame, legs.h2)

    def computed(self) -> None:
        legs = self.legs
        self.wait("activations")
        self.client += legs.across + 2 * legs.frame
        self.ask("gradients", legs.grad_h2, legs.backward + 2 * legs.frame, legs.grad_h1)

    def gradients(self) -> None:
        self.wait("gradients")
        self.client += self.legs.back + self.legs.frame

    def apply(self) -> None:
        self.ask("applied", 0.0, self.legs.trunk_step, 0.0)
        self.client += self.legs.client_step


def step_time(legs: Legs, micros: int, window: int) -> float:
    """Seconds of a step among others, in the order of `flower_app/client/streamed.py`.

    Parameters
    ----------
    legs : Legs
        What each piece takes.
    micros : int
        Micro-batches of a step.
    window : int
        How many may be under way at once; with more than 1 the next step begins before the answer
        to this one's end.
    """
    run, ends = _Run(legs), list[float]()
    for _ in range(min(window, micros)):
        run.compute()
    for number in range(STEPS):
        _one_step(run, micros, window)
        run.apply()
        if window == 1:
            run.wait("applied")
        if number < STEPS - 1:
            for _ in range(min(window, micros)):
                run.compute()
        if window > 1:
            run.wait("applied")
        ends.append(run.client)
    # Ends of like calls: the last one begins no other step.
    return ends[-2] - ends[-3]


def round_trips(micros: int, window: int) -> int:
    """How many of them a step waits for."""
    only = Legs(
        rising=0, across=0, back=0, forward=0, backward=0, client_step=0, trunk_step=0, latency=0.5
    )
    return round(step_time(only, micros, window))


def _one_step(run: _Run, micros: int, window: int) -> None:
    due = deque(("activations", micro) for micro in range(min(window, micros)))
    while due:
        kind, micro = due.popleft()
        following = micro + window if kind == "activations" else micro + 1
        if kind == "activations":
            run.computed()
            due.append(("gradients", micro))
        else:
            run.gradients()
        if following < micros and (kind == "activations") == (window > 1):
            run.compute()
            due.append(("activations", following))
