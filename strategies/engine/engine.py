"""The trunk engine: the server's part of the model, free of any transport.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from conf.schema import TrainConfig
from models import Cut, load_trainable_state, trainable_state
from strategies.engine.bench import Bench
from strategies.engine.member import Member, Round
from strategies.engine.meter import SILENT, Meter
from strategies.engine.policies.registry import find_policy
from strategies.engine.session import Session
from strategies.errors import TrunkError

MAX_GRAPHS = 8
"""Micro-batches of one session whose graphs may wait for their backward at once."""

MAX_STEPS = 2**20
"""Optimizer steps that a session may announce."""

FRAME_OVERHEAD = 2**14
"""More bytes than a frame holds besides its tensors' elements and what comes with each row."""
ROW_OVERHEAD = 25
"""Bytes with each row, at most: with `link.cache_mb` a name, a tag and three bits."""


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
        Most bytes of activations and replies whose step is not over yet, over all sessions.
    meter : Meter
        Told of the work; by default nobody is.

    Raises
    ------
    ConfigError
        If no policy has the name that `train.strategy` gives.

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
        meter: Meter = SILENT,
    ) -> None:
        self.trunk, self.hidden_size, self.train = trunk.eval(), hidden_size, train
        self.bench = Bench(
            next(trunk.parameters()).device,
            hidden_size=hidden_size,
            train=train,
            seed=seed,
            timeout=timeout,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            max_graphs=max_graphs,
            max_in_flight=max_in_flight,
            meter=meter,
        )
        self.meter, self.in_flight = meter, self.bench.in_flight
        self.policy = find_policy(train.strategy)(trunk, train, self.bench)
        self._round: Round | None = None
        self._kept: dict[str, Any] | None = None
        self._sessions: dict[str, Session] = {}
        self._opening: set[str] = set()
        self._lock = threading.Condition()

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
            if key in self._sessions or key in self._opening:
                raise TrunkError(f"session '{key}' was opened before: a ticket serves once")
            if self._round.training:
                self._check_steps(steps)
            member = Member(client=client, steps=steps, round=self._round)
            # Who shares the trunk joins the cohort whose size was just read.
            lane = None if self.policy.replicates else self.policy.open(key, member, cut)
            self._opening.add(key)
        try:
            # A replica is a copy of the trunk, for which nobody else has to wait.
            session = Session(lane or self.policy.open(key, member, cut), self.bench)
            with self._lock:
                self._sessions[key] = session
        finally:
            with self._lock:
                self._opening.discard(key)
                self._lock.notify_all()
        self.meter.opened()
        return session

    def sessions(self) -> int:
        """How many sessions are at work in the open round."""
        with self._lock:
            return sum(not session.closed for session in self._sessions.values())

    def _check_steps(self, steps: int) -> None:
        """The schedule is stretched over what is announced, under `merged` for everybody."""
        if steps < 1:
            raise TrunkError(f"a training session needs at least 1 step, got {steps}")
        most = self.train.local_steps if not self.train.global_batch else 0
        if steps > (most or MAX_STEPS):
            why = f"train.local_steps={most} allows {most}" if most else f"at most {MAX_STEPS} may"
            raise TrunkError(f"a session announces {steps} optimizer steps; {why}")

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
        self.close_round()
        return replicas, statistics

    def close_round(self) -> None:
        """End the round: close all sessions, and forget what they trained apart from the trunk."""
        self._close_sessions()
        self.policy.forget()
        self.trunk.eval()

    def _close_sessions(self) -> None:
        with self._lock:
            self._round = None
            self._lock.wait_for(lambda: not self._opening)
            sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            session.close()

    def abandon_round(self) -> None:
        """End a revocable round as if it had never been."""
        if self._kept is None:
            raise RuntimeError("this round was not opened as revocable")
        kept, self._kept = self._kept, None
        self.close_round()
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

    def codec_seed(self, client: str) -> int:
        """What the codecs of a client's session in the open round draw from; its ticket says it."""
        if self._round is None:
            raise RuntimeError("no round is open")
        return self.bench.codec_seed(client, self._round)

    def largest_frame(self, most_bytes: Callable[[int, int], int]) -> int:
        """Bytes of the largest frame with activations, of which so many elements in rows of a width
        take `most_bytes(elements, width)`, and its mask."""
        positions = self.bench.max_sequences * self.bench.max_tokens
        data = most_bytes(positions * self.hidden_size, self.hidden_size)
        rows = ROW_OVERHEAD * self.bench.max_sequences
        return data + positions // 8 + rows + FRAME_OVERHEAD
