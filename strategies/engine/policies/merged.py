"""The `merged` policy: one trunk, and one step for all sessions of the cohort.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from conf.schema import TrainConfig
from strategies.engine.bench import Bench
from strategies.engine.lane import Lane, StepResult
from strategies.engine.member import Member
from strategies.engine.policies.common_ends import CommonEnds
from strategies.engine.policies.group import Group
from strategies.engine.policy import Policy
from strategies.errors import TrunkError
from strategies.optim import build_optimizer, trainable


class Merged(Policy):
    """One trunk, and one step for the whole cohort.

    The concatenation of the clients' smashed activations is that of Jeon & Kim 2020, *Privacy-
    Sensitive Parallel Split Learning* (ICOIN), with the gradient of the global mean loss. The
    trunk's optimizer lives as long as the run.
    """

    name = "merged"

    def __init__(self, trunk: nn.Module, train: TrainConfig, bench: Bench) -> None:
        super().__init__(trunk, train, bench)
        self._parameters = trainable(trunk)
        self._optimizer = build_optimizer(self._parameters, train)
        self.common: CommonEnds | None = None
        self._group: Group | None = None
        self._cut: dict[str, dict[str, float]] = {}

    @classmethod
    def needs_all_at_once(cls, train: TrainConfig) -> bool:
        """Every step is the whole cohort's."""
        return True

    def start_ends(self, state: Mapping[str, Tensor]) -> None:
        """Set the clients' common tensors, which `train.sync=step` moves."""
        if self.train.sync == "step":
            self.common = CommonEnds(state, self.train)

    def ends(self) -> dict[str, Tensor]:
        """The clients' common tensors as the last step left them."""
        return self.common.state() if self.common is not None else {}

    def lane(self, member: Member) -> Lane:
        """The shared trunk in the round's group."""
        if self.train.sync == "step" and self.common is None:
            raise RuntimeError("train.sync=step: give the clients' first tensors to start_ends")
        if self._group is None:
            self._group = Group(
                self.trunk, self._parameters, self._optimizer, self.common, self.bench
            )
            self._cut = self._group.outliers.cut
        return _GroupLane(self.trunk, member, self.bench, self._group, self._parameters)

    def forget(self) -> None:
        """Drop the group, and what was under way in it."""
        self._group = None
        for parameter in self._parameters:
            parameter.grad = None

    def miss(self) -> None:
        """One client of the cohort will not come."""
        if self._group is not None:
            self._group.miss()

    def anomalies(self) -> dict[str, dict[str, float]]:
        """Whose gradients were cut in the last round that trained."""
        return self._cut

    def statistics(self) -> dict[str, float]:
        """Of the open round: the share of merged positions that padded a shorter micro-batch."""
        group = self._group
        return {"padding": group.padded / group.positions} if group and group.positions else {}

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers, and the clients' common tensors."""
        own = {"optimizer": self._optimizer and self._optimizer.state_dict(), "ends": None}
        if self.common is not None:
            optimizer = self.common.optimizer
            own["ends"] = (self.common.state(), optimizer and optimizer.state_dict())
        return own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self.common = None
        if state["ends"] is not None:
            tensors, optimizer = state["ends"]
            self.common = CommonEnds(tensors, self.train)
            if self.common.optimizer is not None:
                self.common.optimizer.load_state_dict(optimizer)


class _GroupLane(Lane):
    """A member's way into its group: what would spoil the common step is refused here, to it alone,
    before it meets the others' numbers."""

    takes_empty_steps = True

    def __init__(
        self,
        trunk: nn.Module,
        member: Member,
        bench: Bench,
        group: Group,
        parameters: list[nn.Parameter],
    ) -> None:
        super().__init__(trunk, member, bench)
        self.parameters, self._group = parameters, group
        self._due: list[int] = []
        self._declared = 0
        group.join(member)

    def forward(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, *, wanted: bool = True
    ) -> Tensor:
        h_out_BTD = self._group.forward(self.member, h_BTD, mask_BT, wanted=wanted)
        self._due.append(micro)
        return h_out_BTD

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor | None, *, last: bool, tokens: int
    ) -> tuple[Tensor | None, float]:
        if micro != (due := self._due[0]):
            raise TrunkError(
                f"micro-batch {micro} goes back before {due}; merged needs them in the order of "
                "their forwards",
                kind="order",
            )
        if not 0 < tokens <= self.bench.most_tokens:
            raise TrunkError(f"step {step}: a gradient over {tokens} tokens cannot be weighed")
        if self._declared and tokens != self._declared:
            raise TrunkError(
                f"micro-batch {micro} of step {step} comes with {tokens} tokens, the step began "
                f"with {self._declared}"
            )
        answer = self._group.backward(self.member, grad_BTD, tokens, last=last)
        self._declared = tokens
        del self._due[0]
        return answer

    def step(
        self, step: int, square: float, tokens: int, gradients: Mapping[str, Tensor]
    ) -> StepResult:
        if tokens != self._declared:
            raise TrunkError(
                f"step {step} ends with {tokens} tokens, it began with {self._declared}"
            )
        if self._group.ends is not None and tokens:
            self._group.ends.check(gradients)
        norm, lr, state, since = self._group.step(self.member, square, tokens, gradients)
        return StepResult(step=step, grad_norm=norm, lr=lr, state=state, since=since)

    @property
    def ends(self) -> Mapping[str, Tensor]:
        return self._group.ends.parameters if self._group.ends is not None else {}

    def drop(self) -> None:
        self._due.clear()
        self._declared = 0

    def leave(self) -> None:
        self._group.leave(self.member)
