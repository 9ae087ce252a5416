"""How clients' gradients become one trunk: the trunk update policies.

A policy hands each session a `Lane`: the module it runs, the optimizer that moves it, and the turn
it must hold. Policies know neither Flower nor gRPC.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from conf.schema import TrainConfig
from models import Cut
from strategies.aggregation import weighted_mean
from strategies.errors import TrunkError
from strategies.optim import build_optimizer, trainable

if TYPE_CHECKING:
    from strategies.merged import Group


class Turn:
    """The exclusive right to use a shared trunk from the forward pass to the optimizer step.

    A session may take a turn it already holds, and may release one it does not hold.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holder: object | None = None

    def take(self, holder: object, timeout: float) -> None:
        """Wait for the turn; `TrunkError` after `timeout` seconds."""
        with self._free:
            got = self._free.wait_for(lambda: self._holder in (None, holder), timeout)
            if not got:
                raise TrunkError(
                    f"no turn at the shared trunk within {timeout:g} s: another client holds it. "
                    "Raise link.timeout, or use train.strategy=splitfed-v1",
                    kind="timeout",
                )
            self._holder = holder

    def held_by(self, holder: object) -> bool:
        """Whether `holder` has the turn."""
        return self._holder is holder

    def release(self, holder: object) -> None:
        """Give the turn to whoever waits, if `holder` has it."""
        with self._free:
            if self._holder is holder:
                self._holder = None
                self._free.notify()


@dataclass(eq=False)
class Lane:
    """What one session works with."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    turn: Turn | None = None
    parameters: list[nn.Parameter] = field(default_factory=list)
    anchor: list[nn.Parameter] | None = None
    """The round's first values of `parameters`, to which FedProx pulls."""
    group: Group | None = None
    """Under `merged`, the sessions that work as one."""


class Policy(Protocol):
    """Opens lanes during a round and folds them into the trunk at its end."""

    def open(self, key: str, *, training: bool, cut: Cut | None = None) -> Lane:
        """A lane for session `key`; forward-only unless `training`."""

    def close_round(self, weights: Mapping[str, float]) -> None:
        """Fold the lanes of the sessions in `weights` into the trunk; forget all lanes."""

    def state_dict(self) -> dict[str, Any]:
        """What outlives a round besides the trunk's tensors: optimizers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""


def replicate(trunk: nn.Module) -> nn.Module:
    """Copy a module, sharing every parameter that is frozen.

    Returns
    -------
    nn.Module
        Its trainable parameters and its buffers are its own; frozen parameters are the same objects
        as the original's, so a LoRA replica of a large trunk costs only its adapters.
    """
    shared = {id(p): p for p in trunk.parameters() if not p.requires_grad}
    return copy.deepcopy(trunk, shared)


class SplitFedV1:
    """A trunk replica per client, averaged by tokens at the end of the round.

    Source: Thapa et al. 2022, *SplitFed: When Federated Learning Meets Split Learning*
    (arXiv:2004.12088), algorithm SplitFedV1. The result does not depend on the order in which
    clients arrive, and equals FedAvg of the unsplit model.

    Parameters
    ----------
    trunk : nn.Module
        The averaged trunk; it changes only in `close_round`.
    train : TrainConfig
        Optimizer settings. As in FedAvg, every client starts each round with a fresh optimizer.
    """

    def __init__(self, trunk: nn.Module, train: TrainConfig) -> None:
        self.trunk, self._train = trunk, train
        self._lanes: dict[str, Lane] = {}
        self._lock = threading.Lock()

    def open(self, key: str, *, training: bool, cut: Cut | None = None) -> Lane:
        """A replica of the trunk with its own optimizer, or the trunk itself for evaluation."""
        if not training:
            return Lane(self.trunk)
        replica = replicate(self.trunk)
        parameters = trainable(replica)
        lane = Lane(replica, build_optimizer(parameters, self._train), None, parameters)
        if self._train.prox:
            lane.anchor = trainable(self.trunk)  # which the round leaves as it is
        with self._lock:
            self._lanes[key] = lane
        return lane

    def close_round(self, weights: Mapping[str, float]) -> None:
        """Average the replicas of the sessions named, with these weights, into the trunk."""
        with self._lock:
            lanes, self._lanes = self._lanes, {}
        if not weights:
            return
        missing = sorted(set(weights) - set(lanes))
        if missing:
            raise ValueError(f"no trunk replica for sessions {missing}: they never trained")
        states = [_trainable_state(lanes[key].module) for key in weights]
        mean = weighted_mean(states, list(weights.values()))
        with torch.no_grad():
            for name, parameter in self.trunk.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(mean[name])

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every round starts with fresh optimizers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class SplitFedV2:
    """One trunk for all; clients take turns, a step at a time.

    Source: Thapa et al. 2022 (arXiv:2004.12088), algorithm SplitFedV2. A turn lasts from the first
    forward of a step to its optimizer step, so no update meets another client's graph. The trunk's
    optimizer lives as long as the run. The result depends on the order of arrival.
    """

    def __init__(self, trunk: nn.Module, train: TrainConfig) -> None:
        self.trunk = trunk
        self._parameters = trainable(trunk)
        self._optimizer = build_optimizer(self._parameters, train)
        self._turn = Turn()

    def open(self, key: str, *, training: bool, cut: Cut | None = None) -> Lane:
        """The shared trunk, with its optimizer and the turn; without them for evaluation."""
        if not training:
            return Lane(self.trunk)
        return Lane(self.trunk, self._optimizer, self._turn, self._parameters)

    def close_round(self, weights: Mapping[str, float]) -> None:
        """Nothing to fold: every step has moved the one trunk already."""

    def state_dict(self) -> dict[str, Any]:
        """The trunk's optimizer."""
        return {"optimizer": self._optimizer and self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])


POLICIES: dict[str, Callable[[nn.Module, TrainConfig], Policy]] = {
    "splitfed-v1": SplitFedV1,
    "splitfed-v2": SplitFedV2,
}


def build_policy(trunk: nn.Module, train: TrainConfig) -> Policy:
    """The policy that `train.strategy` names."""
    try:
        return POLICIES[train.strategy](trunk, train)
    except KeyError:
        raise ValueError(
            f"unknown train.strategy '{train.strategy}': use one of {sorted(POLICIES)}"
        ) from None


def _trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
