"""The trunk engine: the server's part of the model, free of any transport.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from conf.schema import TrainConfig
from strategies.errors import TrunkError
from strategies.optim import derive_seed
from strategies.policies import build_policy
from strategies.session import Round, Session


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
    ) -> None:
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        self.trunk, self.hidden_size, self.train = trunk, hidden_size, train
        self.seed, self.timeout = seed, timeout
        self.policy = build_policy(trunk, train)
        self.device = next(trunk.parameters()).device
        self._round: Round | None = None
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._random = threading.Lock()

    def open_round(self, number: int, rounds: int, *, training: bool) -> Round:
        """Begin a round. The trunk is in training mode during training rounds only."""
        with self._lock:
            if self._round is not None:
                raise RuntimeError(f"round {self._round.number} is still open: close it first")
            self._round = Round(number=number, rounds=rounds, training=training)
        self.trunk.train(training)
        return self._round

    def open(self, key: str, *, client: str = "", steps: int = 0) -> Session:
        """Open the session of one client in this round.

        Parameters
        ----------
        key : str
            Names the session on the server; each may be opened once a round.
        client : str
            The client's stable name, which seeds the trunk's dropout.
        steps : int
            Optimizer steps that the client plans; the schedule needs them.
        """
        with self._lock:
            if self._round is None:
                raise TrunkError("no round is open: the session came too late", kind="closed")
            if key in self._sessions:
                raise TrunkError(f"session '{key}' was opened before: a ticket serves once")
            if self._round.training and steps < 1:
                raise TrunkError(f"a training session needs at least 1 step, got {steps}")
            lane = self.policy.open(key, training=self._round.training)
            session = Session(self, lane, self._round, client=client, steps=steps)
            self._sessions[key] = session
            return session

    def close_round(self, weights: Mapping[str, float]) -> None:
        """End the round: close all sessions and fold those named, by weight, into the trunk."""
        with self._lock:
            sessions, self._sessions = self._sessions, {}
            self._round = None
        for session in sessions.values():
            session.close()
        self.policy.close_round(weights)
        self.trunk.eval()

    def session_tokens(self, key: str) -> int:
        """Tokens whose steps session `key` has applied; 0 for an unknown session."""
        session = self._sessions.get(key)
        return session.tokens if session else 0

    @contextmanager
    def random(self, *parts: object) -> Iterator[None]:
        """Seed dropout from the run's seed and `parts`, whatever other sessions draw meanwhile."""
        devices = [self.device] if self.device.type == "cuda" else []
        # torch has one generator for dropout in the process, so seeded forwards go one by one.
        with self._random, torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(self.seed, *parts))
            yield
