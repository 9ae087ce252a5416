"""The `splitfed-v2` policy: one trunk, of which clients take turns.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from conf.schema import TrainConfig
from strategies.deadlines import gather
from strategies.engine.bench import Bench
from strategies.engine.lane import Lane, OwnLane
from strategies.engine.member import Member
from strategies.engine.policies.turns import OrderedTurn, Turn
from strategies.engine.policy import Policy
from strategies.optim import build_optimizer, trainable


class SplitFedV2(Policy):
    """One trunk for all; clients take turns, a step at a time.

    Source: Thapa et al. 2022 (arXiv:2004.12088), algorithm SplitFedV2. A turn lasts from the first
    forward of a step to its optimizer step, so no update meets another client's graph. The trunk's
    optimizer lives as long as the run. The result depends on the order of arrival, unless
    `train.turns` is ordered.
    """

    name = "splitfed-v2"

    def __init__(self, trunk: nn.Module, train: TrainConfig, bench: Bench) -> None:
        super().__init__(trunk, train, bench)
        self._parameters = trainable(trunk)
        self._optimizer = build_optimizer(self._parameters, train)
        self.forget()

    @classmethod
    def needs_all_at_once(cls, train: TrainConfig) -> bool:
        """Ordered turns begin with the whole cohort."""
        return train.turns == "ordered"

    def lane(self, member: Member) -> Lane:
        """The shared trunk, with its optimizer, in turns."""
        return _TurnLane(
            self.trunk,
            member,
            self.bench,
            optimizer=self._optimizer,
            parameters=self._parameters,
            turn=self._turn,
        )

    def forget(self) -> None:
        """Begin the next round's turns."""
        self._turn = OrderedTurn() if self.train.turns == "ordered" else Turn()

    def miss(self) -> None:
        """One client of the cohort will not come."""
        self._turn.miss()

    def state_dict(self) -> dict[str, Any]:
        """The trunk's optimizer."""
        return {"optimizer": self._optimizer and self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])


class _TurnLane(OwnLane):
    """The shared trunk while it is this member's turn: from a step's first forward to its end."""

    def __init__(
        self, module: nn.Module, member: Member, bench: Bench, *, turn: Turn, **own: Any
    ) -> None:
        super().__init__(module, member, bench, **own)
        self._turn = turn
        turn.join(member, cohort=member.round.cohort, patience=gather(bench.timeout))

    def begin(self) -> None:
        self._turn.take(self.member, self.bench.timeout)

    def drop(self) -> None:
        super().drop()
        self._turn.release(self.member)

    def leave(self) -> None:
        self._turn.leave(self.member)

    def close(self) -> None:
        if self._turn.held_by(self.member):
            # What was left half-way is nobody's.
            for parameter in self.parameters:
                parameter.grad = None
        super().close()
