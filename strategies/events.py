"""What happens in a run, as the strategy tells it to whoever records it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Turnout:
    """Who was asked for one thing, whose answers count, and why each of the others is missing."""

    asked: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def reasons(self) -> str:
        """Every reason, by name."""
        return "; ".join(f"{name}: {why}" for name, why in sorted(self.missing.items()))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A cohort is asked to train, or to evaluate."""

    round: int
    attempt: int
    """At the round, from 1."""
    training: bool
    clients: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A client's answer came, or it is known that none will; follows an `Asked` of its attempt."""

    round: int
    attempt: int
    training: bool
    client: str
    why: str = ""
    """Why the answer does not count; empty: it does, if the attempt has its quorum."""


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A client's optimizer step that the trunk has applied. Comes from several threads."""

    round: int
    attempt: int
    """At the round, from 1: steps of a later attempt take the place of an earlier one's."""
    client: str
    step: int
    """From 1, of the `steps` that the client takes in the round."""
    steps: int
    loss: float
    """Mean over `tokens` tokens, in nats."""
    tokens: int
    grad_norm: float
    """Over all parts, before clipping."""
    lr: float
    bytes_up: int
    bytes_down: int
    """From the client to the trunk and back, since its last step."""
    seconds: Mapping[str, float]
    """In `bottom`, `network`, `trunk` and `top`."""


@dataclass(frozen=True, kw_only=True)
class RoundDone:
    """A round that is over; round 0 is the evaluation before training."""

    round: int
    train: Mapping[str, float] | None
    evaluate: Mapping[str, float] | None
    """Metrics over all clients, `loss` weighted by tokens. None: nothing was measured."""
    training: Turnout | None
    evaluation: Turnout | None
    """None: nobody was asked to. With `evaluate` None, `missing` says why it could not be done."""
    abandoned: tuple[Turnout, ...] = ()
    """The attempts before the last one, which were undone."""
    central: Mapping[str, float] | None = None
    """The same of the whole model on the server's own file (`data.central_path`)."""
    tokens: int = 0
    """Trained on, in the answers that count."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    per_client: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    """By client, `train` and `evaluate`: what its answers that count say."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """Of the server's process in MB: `server_mb`, `server_peak_mb`, `gpu_peak_mb` on a GPU."""
    anomalies: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By client whose update is far from the others': its `distance` from the coordinates' median
    and how many `times` the median client's that is; under `merged`, the `clipped` steps in which
    its gradient was cut, and the most `clipped_times` the median norm."""
    epsilon: Mapping[str, float] = field(default_factory=dict)
    """So far, of `rows` and `updates`, as the summary's `privacy` says it at the end; the recorder
    states it."""


@dataclass(frozen=True, kw_only=True)
class RoundTrained:
    """A round that was trained and will now be evaluated; a `RoundDone` follows that counts."""

    so_far: RoundDone

    @property
    def round(self) -> int:
        """Its number."""
        return self.so_far.round


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The run ends after this round, before all are done."""

    round: int
    rounds: int
    """That were planned."""
    why: str = ""
    """Why training is over (`train.patience`); empty: it was asked to stop, and can be resumed."""


def anomaly_words(told: Mapping[str, float]) -> str:
    """What `RoundDone.anomalies` says of one client, in words."""
    parts = []
    if "distance" in told:
        text = "{distance:.3g} from the clients' median, {times:.3g} times the median client"
        parts.append(text.format(**told))
    if "clipped" in told:
        text = "gradient cut in {clipped:.0f} steps, at most {clipped_times:.3g} times the median"
        parts.append(text.format(**told))
    return ", ".join(parts)


Event = Asked | Answered | StepDone | RoundTrained | RoundDone | Stopped
Observer = Callable[[Event], None]
