"""The trunk engine: the server's part of the model, free of any transport.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from conf.schema import TrainConfig
from models import Cut, load_trainable_state, trainable_state
from strategies.engine.checks import InFlight
from strategies.engine.policies.merged import Merged
from strategies.engine.policies.registry import Policy, SplitFedV1, SplitFedV2
from strategies.engine.session import MAX_GRAPHS, Round, Session
from strategies.errors import TrunkError
from strategies.optim import derive_seed

POLICIES: dict[str, Callable[[nn.Module, TrainConfig], Policy]] = {
    "splitfed-v1": SplitFedV1,
    "splitfed-v2": SplitFedV2,
    "merged": Merged,
}
"""What `train.strategy` may name."""

FRAME_OVERHEAD = 2**14
"""More bytes than a frame holds besides its tensors' elements."""


class TrunkEngine:
    """Holds the trunk and the open sessions; a policy decides how the trunk learns.

    Parameters
    ----------
    trunk : nn.Module
        Callable as ``trunk(h_BTD, mask_BT) -> h_BTD``; the parameters that require gradients are
        trained. `models.load_part` and `models.split` make one.
    hidden_size : int
        D, which every activation must have.
    train : TrainConfig
        Strategy, optimizer, schedule, clipping and precision.
    seed : int
        Seed of the run; dropout in the trunk depends on it, the round, the client and the step.
    timeout : float
        Seconds a session may wait for its turn (`splitfed-v2`).
    max_sequences, max_tokens : int
        Largest B and T that are accepted: attention takes memory that grows with the square of T.
    max_graphs : int
        Micro-batches of one session whose graphs may wait at once; 0: all of a step.
    max_in_flight : int
        Most bytes of activations whose step is not taken yet, over all sessions.

    Notes
    -----
    A session is driven by one thread; different sessions may run at once.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        hidden_size: int,
        train: TrainConfig,
        seed: int = 0,
        timeout: float = 120.0,
        max_sequences: int = 2**16,
        max_tokens: int = 2**16,
        max_graphs: int = MAX_GRAPHS,
        max_in_flight: int = 2**32,
    ) -> None:
        self.in_flight = InFlight(max_in_flight)
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        self.trunk, self.hidden_size, self.train = trunk, hidden_size, train
        self.seed, self.timeout = seed, timeout
        # A drawn batch may fall to one client as a whole.
        drawn = math.ceil(train.global_batch / train.batch_size)
        self.max_micro_batches = max(train.accumulate, drawn)
        self.max_graphs = max_graphs or self.max_micro_batches
        self.policy = POLICIES[train.strategy](trunk, train)
        self.device = next(trunk.parameters()).device
        self._round: Round | None = None
        self._kept: dict[str, Any] | None = None
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._random = threading.Lock()

    def open_round(
        self, number: int, rounds: int, *, training: bool, cohort: int = 0, revocable: bool = False
    ) -> Round:
        """Begin a round. The trunk is in training mode during training rounds only.

        Parameters
        ----------
        number, rounds : int
            Which round of how many.
        training : bool
            False: forward only.
        cohort : int
            Clients that were asked; `merged` waits for so many sessions before its first step.
        revocable : bool
            Keep a copy of what the round may change, so that `abandon_round` can undo it.
        """
        with self._lock:
            if self._round is not None:
                raise RuntimeError(f"round {self._round.number} is still open: close it first")
            self._round = Round(number=number, rounds=rounds, training=training, cohort=cohort)
        self._kept = copy.deepcopy(self.state_dict()) if revocable else None
        self.trunk.train(training)
        return self._round

    def open(
        self, key: str, *, client: str = "", steps: int = 0, cut: Cut | None = None
    ) -> Session:
        """Open the session of one client in this round.

        Parameters
        ----------
        key : str
            Names the session on the server; each may be opened once a round.
        client : str
            The client's stable name, which seeds the trunk's dropout.
        steps : int
            Optimizer steps that the client plans; the schedule needs them.
        cut : Cut, optional
            The client's own cut, if its ends are larger than the trunk leaves them.
        """
        with self._lock:
            if self._round is None:
                raise TrunkError("no round is open: the session came too late", kind="closed")
            if key in self._sessions:
                raise TrunkError(f"session '{key}' was opened before: a ticket serves once")
            if self._round.training and steps < 1:
                raise TrunkError(f"a training session needs at least 1 step, got {steps}")
            lane = self.policy.open(key, training=self._round.training, cut=cut)
            session = Session(self, lane, self._round, client=client, steps=steps)
            self._sessions[key] = session
            return session

    def collect(self, keys: Iterable[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
        """End the round without folding anything into the trunk.

        Returns
        -------
        replicas : dict
            What each of these sessions trained of the trunk apart from the others, by name in the
            whole model; empty where there is one trunk.
        statistics : dict
            What the policy has to tell of the round.
        """
        self._close_sessions()
        replicas, statistics = self.policy.states(keys), self.policy.statistics()
        self.policy.forget()
        self.trunk.eval()
        return replicas, statistics

    def close_round(self, weights: Mapping[str, float]) -> None:
        """End the round: close all sessions and fold those named, by weight, into the trunk."""
        self._close_sessions()
        self.policy.close_round(weights)
        self.trunk.eval()

    def _close_sessions(self) -> None:
        with self._lock:
            sessions, self._sessions = self._sessions, {}
            self._round = None
        for session in sessions.values():
            session.close()

    def abandon_round(self) -> None:
        """End a revocable round as if it had never been."""
        if self._kept is None:
            raise RuntimeError("this round was not opened as revocable")
        kept, self._kept = self._kept, None
        self.close_round({})
        self.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        """What training has changed: the trunk's trainable tensors and the policy's own state."""
        return {"trunk": trainable_state(self.trunk), "policy": self.policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`; `ValueError` if its tensors are not this trunk's."""
        load_trainable_state(self.trunk, state["trunk"])
        self.policy.load_state_dict(state["policy"])

    def has(self, key: str) -> bool:
        """Whether session `key` was opened in this round."""
        return key in self._sessions

    def miss(self) -> None:
        """Say that one client of the cohort will open no session: nobody need wait for it."""
        with self._lock:
            if self._round is not None:
                self._round = replace(self._round, cohort=self._round.cohort - 1)
        self.policy.miss()

    def finish(self, key: str) -> tuple[int, int]:
        """End session `key` for good; returns the tokens and the optimizer steps it took part in.

        Held-out tokens, if it evaluates; nothing for an unknown session.
        """
        session = self._sessions.get(key)
        if session is None:
            return 0, 0
        session.close()
        return session.tokens, session.applied

    def largest_frame(self, itemsize: int) -> int:
        """Bytes of the largest frame with activations of so many bytes an element, and its mask."""
        elements = self.max_sequences * self.max_tokens
        return elements * self.hidden_size * itemsize + elements // 8 + FRAME_OVERHEAD

    @contextmanager
    def random(self, *parts: object) -> Iterator[None]:
        """Seed dropout from the run's seed and `parts`, whatever other sessions draw meanwhile."""
        devices = [self.device] if self.device.type == "cuda" else []
        # torch has one generator for dropout in the process, so seeded forwards go one by one.
        with self._random, torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(self.seed, *parts))
            yield
