"""How clients' gradients become one trunk: what every trunk update policy is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from conf.schema import TrainConfig
from models import Cut, load_trainable_state
from strategies.engine.bench import Bench
from strategies.engine.lane import Lane
from strategies.engine.member import Member
from strategies.errors import TrunkError


class Policy:
    """Gives each session a `Lane`. Knows neither Flower nor gRPC, neither session nor engine.

    What it does not override is right where all sessions share one trunk, every step moves it,
    and nothing but its tensors outlives a round.

    Parameters
    ----------
    trunk : nn.Module
        The trunk that is kept from round to round.
    train : TrainConfig
        How it learns.
    bench : Bench
        Where lanes do their work.
    """

    name: ClassVar[str] = ""
    """What `train.strategy` calls it."""
    replicates: ClassVar[bool] = False
    """Whether each session trains a trunk of its own, which `states` gives to be averaged; only
    then may a client have a cut of its own."""

    def __init__(self, trunk: nn.Module, train: TrainConfig, bench: Bench) -> None:
        self.trunk, self.train, self.bench = trunk, train, bench

    @classmethod
    def needs_all_at_once(cls, train: TrainConfig) -> bool:
        """Whether a round waits for its whole cohort, so that all must run at the same time."""
        return False

    def open(self, key: str, member: Member, cut: Cut | None = None) -> Lane:
        """A lane for session `key`; forward-only unless the member's round is for training.

        `cut` is the client's, if its ends are larger than the trunk leaves them; `TrunkError` if
        the policy or the trunk cannot serve it.
        """
        self.refuse_cut(cut)
        return self.lane(member) if member.round.training else Lane(self.trunk, member, self.bench)

    def lane(self, member: Member) -> Lane:
        """A lane that trains."""
        raise NotImplementedError

    def start_ends(self, state: Mapping[str, Tensor]) -> None:
        """Learn the clients' first tensors, by name in the whole model."""

    def ends(self) -> dict[str, Tensor]:
        """The clients' common tensors, where a step of the trunk's moves them; else nothing."""
        return {}

    def states(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """What each of these sessions has trained of the trunk apart from the others, by name in
        the whole model; nothing where there is one trunk for all."""
        return {key: {} for key in keys}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy what was averaged into the trunk; `ValueError` if a name or a shape differs."""
        if state:
            load_trainable_state(self.trunk, state)

    def forget(self) -> None:
        """Drop all lanes: the round is over."""

    def miss(self) -> None:
        """One client of the cohort will open no session."""

    def statistics(self) -> dict[str, float]:
        """What there is to tell of the open round."""
        return {}

    def anomalies(self) -> Mapping[str, Mapping[str, float]]:
        """By client, what stood out of the gradients in the last round; see `RoundDone`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What outlives a round besides the trunk's tensors: optimizers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""

    def refuse_cut(self, cut: Cut | None) -> None:
        """Refuse a client's own cut where all clients share one trunk."""
        if cut is not None and cut != getattr(self.trunk, "cut", None):
            raise TrunkError(
                f"a client states the cut {cut}; under train.strategy={self.name} all clients have "
                "the run's own. Use train.strategy=splitfed-v1, or take cut-bottom and cut-top out "
                "of its node config"
            )
