"""Turns at a shared trunk: by arrival, or in an order that repeats."""

from __future__ import annotations

import logging
import math
import threading
import time

from strategies.engine.member import Member
from strategies.errors import TrunkError

logger = logging.getLogger(__name__)


class Turn:
    """The exclusive right to use a shared trunk from the forward pass to the optimizer step.

    A member may take a turn it already holds, and may release one it does not hold.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._holder: Member | None = None
        self._queue: list[Member] = []

    def join(self, member: Member, *, cohort: int, patience: float) -> None:
        """Say that a member of a cohort will ask for turns."""

    def leave(self, member: Member) -> None:
        """Say that it will ask for no more; a turn that it holds stays its own until released."""

    def miss(self) -> None:
        """Expect one member less."""

    def take(self, holder: Member, timeout: float) -> None:
        """Wait for the turn; `TrunkError` after `timeout` seconds."""
        with self._free:
            if self._holder is holder:
                return
            self._queue.append(holder)
            # First come, first served: who steps often must not keep the others out.
            got = self._free.wait_for(
                lambda: self._holder is None and self._queue[0] is holder, timeout
            )
            self._queue.remove(holder)
            if not got:
                self._free.notify_all()
                raise _none_within(timeout)
            self._holder = holder

    def held_by(self, holder: Member) -> bool:
        """Whether `holder` has the turn."""
        return self._holder is holder

    def release(self, holder: Member) -> None:
        """Give the turn to whoever waits, if `holder` has it."""
        with self._free:
            if self._holder is holder:
                self._holder = None
                self._free.notify_all()


class OrderedTurn(Turn):
    """Turns that do not depend on who is quicker.

    Of the members that have steps to take, the next turn is that of the one with the fewest taken,
    by name where they are equal. So the first turn waits until the whole cohort has come, and every
    turn until its member asks for it. One object serves one round.
    """

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[Member, int] = {}
        self._cohort = self._joined = 0
        self._patience = 0.0
        self._deadline: float | None = None

    def join(self, member: Member, *, cohort: int, patience: float) -> None:
        """Take part."""
        with self._free:
            if not self._joined:
                self._cohort, self._patience = cohort, patience
            self._joined += 1
            self._taken[member] = 0
            self._free.notify_all()

    def leave(self, member: Member) -> None:
        """Take part no longer: nobody waits for it."""
        with self._free:
            self._taken.pop(member, None)
            self._free.notify_all()

    def miss(self) -> None:
        """Expect one member less."""
        with self._free:
            self._cohort -= 1
            self._free.notify_all()

    def take(self, holder: Member, timeout: float) -> None:
        """Wait for the turn; `TrunkError` after `timeout` seconds, or if the session has ended."""
        end = time.monotonic() + timeout
        with self._free:
            if self._deadline is None:
                self._deadline = time.monotonic() + self._patience
            while self._holder is not holder:
                if holder not in self._taken:
                    raise TrunkError("the session has ended", kind="closed")
                if self._holder is None and self._gathered() and self._next() is holder:
                    self._holder = holder
                elif (left := end - time.monotonic()) <= 0:
                    raise _none_within(timeout)
                else:
                    # The deadline of gathering is one of the things to wake up for.
                    self._free.wait(min(left, max(0.0, self._deadline - time.monotonic()) or left))

    def release(self, holder: Member) -> None:
        """Give the turn to whose it is next, if `holder` has it: a step of its own is done."""
        with self._free:
            if self._holder is holder and holder in self._taken:
                self._taken[holder] += 1
        super().release(holder)

    def _next(self) -> Member | None:
        due = [(n, member) for member, n in self._taken.items() if n < member.steps]
        return min(due, key=lambda entry: (entry[0], entry[1].client), default=(0, None))[1]

    def _gathered(self) -> bool:
        assert self._deadline is not None
        if self._joined >= self._cohort or math.isinf(self._deadline):
            return True
        if time.monotonic() < self._deadline:
            return False
        self._deadline = math.inf
        self._free.notify_all()
        logger.warning(
            "train.turns=ordered: %d of %d clients of the cohort have come within %.0f s and begin "
            "without the others, which join when they do: this round may not repeat exactly. In a "
            "simulation let all run at once (--federation-config 'client-resources-num-cpus=1 "
            "init-args-num-cpus=%d'), or set link.transport=messages",
            *(self._joined, self._cohort, self._patience, self._cohort),
        )
        return True


def _none_within(timeout: float) -> TrunkError:
    return TrunkError(
        f"no turn at the shared trunk within {timeout:g} s: another client holds it. "
        "Raise link.timeout, or use train.strategy=splitfed-v1",
        kind="timeout",
    )
