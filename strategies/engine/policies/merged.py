"""The `merged` policy: one trunk, and one step for all sessions of the cohort."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import TrainConfig
from models import Cut, load_trainable_state
from strategies.engine.checks import check_finite
from strategies.engine.policies.group import Group
from strategies.engine.policies.registry import Lane, refuse_cut
from strategies.errors import TrunkError
from strategies.optim import build_optimizer, square_norm, trainable


class Ends:
    """The clients' bottom and top, which under `train.sync=step` take one common step.

    Parameters
    ----------
    state : mapping
        Their trainable tensors by global name, floating point.
    train : TrainConfig
        Optimizer settings. The optimizer lives as long as the run.
    """

    def __init__(self, state: Mapping[str, Tensor], train: TrainConfig) -> None:
        self.parameters = {name: nn.Parameter(value.clone()) for name, value in state.items()}
        self.optimizer = build_optimizer(list(self.parameters.values()), train)

    def set_gradients(self, gradients: Sequence[tuple[int, Mapping[str, Tensor]]]) -> float:
        """Take the mean of the clients' gradients, weighted by tokens; returns its squared norm."""
        total = sum(tokens for tokens, _ in gradients)
        for name, parameter in self.parameters.items():
            mean = torch.zeros_like(parameter, dtype=torch.float64)
            for tokens, own in gradients:
                if tokens:
                    mean.add_(own[name].to(mean), alpha=tokens / total)
            parameter.grad = mean.to(parameter.dtype)
        return square_norm(self.parameters.values())

    def check(self, gradients: Mapping[str, Tensor]) -> None:
        """Refuse gradients that are not of exactly these tensors."""
        self.check_shapes({name: tuple(gradient.shape) for name, gradient in gradients.items()})
        for name, gradient in gradients.items():
            check_finite(gradient, f"the gradient of '{name}'")

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse other names or shapes than those of these tensors."""
        odd = sorted(self.parameters.keys() ^ shapes.keys())
        odd = odd or [n for n, shape in shapes.items() if shape != self.parameters[n].shape]
        if odd:
            raise TrunkError(
                f"the gradients differ from the clients' common tensors in {odd[:3]}", kind="shape"
            )

    def state(self) -> dict[str, Tensor]:
        """The tensors after the last step."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


class Merged:
    """One trunk, and one step for the whole cohort.

    The concatenation of the clients' smashed activations is that of Jeon & Kim 2020, *Privacy-
    Sensitive Parallel Split Learning* (ICOIN), with the gradient of the global mean loss.

    Parameters
    ----------
    trunk : nn.Module
        Moves with every step; its optimizer lives as long as the run.
    train : TrainConfig
        Optimizer settings, and `sync`.
    """

    def __init__(self, trunk: nn.Module, train: TrainConfig) -> None:
        self.trunk, self._train = trunk, train
        self._parameters = trainable(trunk)
        self._optimizer = build_optimizer(self._parameters, train)
        self.ends: Ends | None = None
        self._group: Group | None = None

    def start_ends(self, state: Mapping[str, Tensor]) -> None:
        """Set the clients' common tensors, which `train.sync=step` moves."""
        self.ends = Ends(state, self._train)

    def open(self, key: str, *, training: bool, cut: Cut | None = None) -> Lane:
        """The shared trunk and the round's group; without the group for evaluation."""
        refuse_cut(self.trunk, cut, "merged")
        if not training:
            return Lane(self.trunk)
        if self._train.sync == "step" and self.ends is None:
            raise RuntimeError("train.sync=step: give the clients' first tensors to start_ends")
        if self._group is None:
            self._group = Group(self._optimizer, self._parameters, self._train, self.ends)
        return Lane(self.trunk, None, None, self._parameters, group=self._group)

    def states(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Nothing for any session: there is one trunk."""
        return {key: {} for key in keys}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the trunk; an empty one changes nothing."""
        if state:
            load_trainable_state(self.trunk, state)

    def forget(self) -> None:
        """Drop the group, and what was under way in it."""
        self._group = None
        for parameter in self._parameters:
            parameter.grad = None

    def close_round(self, weights: Mapping[str, float]) -> None:
        """Nothing to fold: every step has moved the one trunk already."""
        self.forget()

    def miss(self) -> None:
        """One client of the cohort will not come."""
        if self._group is not None:
            self._group.miss()

    def statistics(self) -> dict[str, float]:
        """Of the open round: the share of merged positions that padded a shorter micro-batch."""
        group = self._group
        return {"padding": group.padded / group.positions} if group and group.positions else {}

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers, and the clients' common tensors."""
        own = {"optimizer": self._optimizer and self._optimizer.state_dict(), "ends": None}
        if self.ends is not None:
            optimizer = self.ends.optimizer
            own["ends"] = (self.ends.state(), optimizer and optimizer.state_dict())
        return own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self.ends = None
        if state["ends"] is not None:
            tensors, optimizer = state["ends"]
            self.ends = Ends(tensors, self._train)
            if self.ends.optimizer is not None:
                self.ends.optimizer.load_state_dict(optimizer)
