"""How clients' gradients become one trunk: the trunk update policies.

A policy hands each session a `Lane`: the module it runs, the optimizer that moves it, and the turn
it must hold. Policies know neither Flower nor gRPC.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from conf.schema import TrainConfig
from models import Cut, Part, load_trainable_state, narrow, trainable_state
from strategies.aggregate.means import weighted_mean
from strategies.engine.policies.turns import Turn, turns
from strategies.errors import TrunkError
from strategies.optim import build_optimizer, trainable

if TYPE_CHECKING:
    from strategies.engine.policies.group import Group


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
        """A lane for session `key`; forward-only unless `training`.

        `cut` is the client's, if its ends are larger than the trunk leaves them; `TrunkError` if
        the policy or the trunk cannot serve it.
        """

    def states(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """What each of these sessions has trained of the trunk apart from the others.

        By name in the whole model; nothing where there is one trunk for all.
        """

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy what was averaged into the trunk; `ValueError` if a name or a shape differs."""

    def forget(self) -> None:
        """Drop all lanes, folded or not."""

    def close_round(self, weights: Mapping[str, float]) -> None:
        """Fold the lanes of the sessions in `weights` into the trunk; forget all lanes."""

    def miss(self) -> None:
        """One client of the cohort will open no session."""

    def statistics(self) -> dict[str, float]:
        """What there is to tell of the open round."""

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

    A client with larger ends has a replica of the blocks between them alone. Its other blocks are
    in its ends, so that a layer's mean is over `states` and ends together, name by name.

    Parameters
    ----------
    trunk : nn.Module
        The averaged trunk; it changes only in `load` and `close_round`.
    train : TrainConfig
        Optimizer settings. As in FedAvg, every client starts each round with a fresh optimizer.
    """

    def __init__(self, trunk: nn.Module, train: TrainConfig) -> None:
        self.trunk, self._train = trunk, train
        self._lanes: dict[str, Lane] = {}
        self._lock = threading.Lock()

    def open(self, key: str, *, training: bool, cut: Cut | None = None) -> Lane:
        """A replica of the trunk with its own optimizer, or the trunk itself for evaluation."""
        own = _between(self.trunk, cut)
        if not training:
            return Lane(own)
        replica = replicate(own)
        parameters = trainable(replica)
        lane = Lane(replica, build_optimizer(parameters, self._train), None, parameters)
        if self._train.prox:
            lane.anchor = trainable(own)  # which the round leaves as it is
        with self._lock:
            self._lanes[key] = lane
        return lane

    def states(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The trained tensors of each of these sessions' replicas; they are the replicas' own."""
        wanted = list(keys)
        with self._lock:
            lanes = dict(self._lanes)
        if missing := sorted(set(wanted) - set(lanes)):
            raise ValueError(f"no trunk replica for sessions {missing}: they never trained")
        return {key: trainable_state(lanes[key].module) for key in wanted}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy an average into the trunk, strict on names and shapes."""
        load_trainable_state(self.trunk, state)

    def forget(self) -> None:
        """Drop all replicas."""
        with self._lock:
            self._lanes = {}

    def close_round(self, weights: Mapping[str, float]) -> None:
        """Average the replicas of the sessions named, with these weights, into the trunk.

        Only where all have the trunk's own cut: other blocks are in clients' ends too.
        """
        try:
            if weights:
                states = self.states(weights)
                self.load(weighted_mean(list(states.values()), list(weights.values())))
        finally:
            self.forget()

    def miss(self) -> None:
        """Nobody waits for another."""

    def statistics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every round starts with fresh optimizers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class SplitFedV2:
    """One trunk for all; clients take turns, a step at a time.

    Source: Thapa et al. 2022 (arXiv:2004.12088), algorithm SplitFedV2. A turn lasts from the first
    forward of a step to its optimizer step, so no update meets another client's graph. The trunk's
    optimizer lives as long as the run. The result depends on the order of arrival, unless
    `train.turns` is ordered.
    """

    def __init__(self, trunk: nn.Module, train: TrainConfig) -> None:
        self.trunk = trunk
        self._parameters = trainable(trunk)
        self._optimizer = build_optimizer(self._parameters, train)
        self._turns = turns(train)
        self._turn = self._turns()

    def open(self, key: str, *, training: bool, cut: Cut | None = None) -> Lane:
        """The shared trunk, with its optimizer and the turn; without them for evaluation."""
        refuse_cut(self.trunk, cut, "splitfed-v2")
        if not training:
            return Lane(self.trunk)
        return Lane(self.trunk, self._optimizer, self._turn, self._parameters)

    def states(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Nothing for any session: there is one trunk."""
        return {key: {} for key in keys}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the trunk; an empty one changes nothing."""
        if state:
            load_trainable_state(self.trunk, state)

    def forget(self) -> None:
        """Drop the round's turns."""
        self._turn = self._turns()

    def close_round(self, weights: Mapping[str, float]) -> None:
        """Nothing to fold: every step has moved the one trunk already."""
        self.forget()

    def miss(self) -> None:
        """One client of the cohort will not come."""
        self._turn.miss()

    def statistics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The trunk's optimizer."""
        return {"optimizer": self._optimizer and self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])


def refuse_cut(trunk: nn.Module, cut: Cut | None, strategy: str) -> None:
    """Refuse a client's own cut where all clients share one trunk."""
    if cut is not None and cut != getattr(trunk, "cut", None):
        raise TrunkError(
            f"a client states the cut {cut}; under train.strategy={strategy} all clients have the "
            "run's own. Use train.strategy=splitfed-v1, or take cut-bottom and cut-top out of its "
            "node config"
        )


def _between(trunk: nn.Module, cut: Cut | None) -> nn.Module:
    """What a client with this cut leaves of the trunk."""
    if cut is None:
        return trunk
    if not isinstance(trunk, Part):
        raise TrunkError(f"a client states the cut {cut}; this trunk has no blocks to leave out")
    try:
        return narrow(trunk, cut)
    except ValueError as error:
        raise TrunkError(f"a client states the cut {cut}: {error}") from None
