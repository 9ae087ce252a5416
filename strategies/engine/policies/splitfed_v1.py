"""The `splitfed-v1` policy: a trunk replica per client, averaged at the end of the round."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from conf.schema import TrainConfig
from models import Cut, Part, load_trainable_state, narrow, trainable_state
from strategies.engine.bench import Bench
from strategies.engine.lane import Lane, OwnLane
from strategies.engine.member import Member
from strategies.engine.policy import Policy
from strategies.errors import TrunkError
from strategies.optim import build_optimizer, trainable


class SplitFedV1(Policy):
    """A trunk replica per client, averaged by tokens at the end of the round.

    Source: Thapa et al. 2022, *SplitFed: When Federated Learning Meets Split Learning*
    (arXiv:2004.12088), algorithm SplitFedV1. The result does not depend on the order in which
    clients arrive, and equals FedAvg of the unsplit model: every client starts each round with a
    fresh optimizer, and the trunk itself changes only in `load`.

    A client with larger ends has a replica of the blocks between them alone. Its other blocks are
    in its ends, so that a layer's mean is over `states` and ends together, name by name.
    """

    name = "splitfed-v1"
    replicates = True

    def __init__(self, trunk: nn.Module, train: TrainConfig, bench: Bench) -> None:
        super().__init__(trunk, train, bench)
        self._replicas: dict[str, nn.Module] = {}
        self._lock = threading.Lock()

    def open(self, key: str, member: Member, cut: Cut | None = None) -> Lane:
        """A replica of the trunk with its own optimizer, or the trunk itself for evaluation."""
        own = _between(self.trunk, cut)
        if not member.round.training:
            return Lane(own, member, self.bench)
        replica = replicate(own)
        parameters = trainable(replica)
        with self._lock:
            self._replicas[key] = replica
        return OwnLane(
            replica,
            member,
            self.bench,
            optimizer=build_optimizer(parameters, self.train),
            parameters=parameters,
            # The round leaves these as they are.
            anchor=trainable(own) if self.train.prox else None,
        )

    def states(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The trained tensors of each of these sessions' replicas; they are the replicas' own."""
        wanted = list(keys)
        with self._lock:
            replicas = dict(self._replicas)
        if missing := sorted(set(wanted) - set(replicas)):
            raise ValueError(f"no trunk replica for sessions {missing}: they never trained")
        return {key: trainable_state(replicas[key]) for key in wanted}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy an average into the trunk, strict on names and shapes."""
        load_trainable_state(self.trunk, state)

    def forget(self) -> None:
        """Drop all replicas."""
        with self._lock:
            self._replicas = {}


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
