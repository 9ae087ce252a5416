"""Where the threads of a round's members wait for each other, and one does the work of all."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from strategies.engine.member import Member
from strategies.errors import TrunkError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """What one member asks for, and the answer."""

    member: Member
    kind: str
    payload: tuple[Any, ...]
    answer: Any = None
    grad_BTD: Tensor | None = None
    """A part of the answer, known before it once the request has `gone_back`."""
    gone_back: bool = False
    error: Exception | None = None
    done: bool = False


class Meeting:
    """Members ask for one thing at a time; when all wait, the last to come serves them.

    It does so without the lock, so that meanwhile others join, leave, are missed, or ask for what
    comes next, and none of them waits for the work. To the work it is as if they had done so right
    after it: it is given what was asked for when it began, and what it reads and writes is changed
    by others through `note` alone.

    Parameters
    ----------
    kinds : sequence of str
        Of requests, in the order in which they are served.
    work : callable
        Given a kind and all requests of it, by the members' names: answers them. An error is the
        answer to all of them. Never called twice at once.
    patience : float
        Seconds that the first request waits for those of the cohort who have not come.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        work: Callable[[str, list[Request]], None],
        patience: float,
    ) -> None:
        self._kinds, self._work, self._patience = kinds, work, patience
        self.changed = threading.Condition()
        """Held while anything here changes, but not while the work is done."""
        self.waiting: dict[Member, Request] = {}
        """What each member asked for when the work under way began."""
        self._members: dict[Member, Request | None] = {}
        self._working = False
        self._noted: list[Callable[[], None]] = []
        self._cohort = self._joined = 0
        self._deadline: float | None = None

    def join(self, member: Member) -> None:
        """Be waited for from now on."""
        with self.changed:
            if not self._joined:
                self._cohort = member.round.cohort
            self._joined += 1
            self._members[member] = None

    def leave(self, member: Member, error: Exception) -> None:
        """Be waited for no more; a request that waits, or is served, is answered with the error."""
        with self.changed:
            request = self._members.pop(member, None)
            if request is not None and not request.done:
                request.error, request.done = error, True
            self.changed.notify_all()

    def miss(self) -> None:
        """Expect one member less."""
        with self.changed:
            self._cohort -= 1
            self.changed.notify_all()

    def note(self, change: Callable[[], None]) -> None:
        """Change what the work reads and writes: at once, or after the work that is under way."""
        with self.changed:
            if self._working:
                self._noted.append(change)
            else:
                change()

    def ask(self, request: Request) -> Any:
        """Wait for the answer; raise the error if it is one."""
        with self.changed:
            if request.member not in self._members:
                raise TrunkError("the session has ended", kind="closed")
            self._members[request.member] = request
            if self._deadline is None:
                self._deadline = time.monotonic() + self._patience
            while not request.done:
                if self._all_wait():
                    self._serve()
                else:
                    # Once the deadline is past, only a change is worth waking up for.
                    self.changed.wait(self._until_deadline() or None)
            if request.error is not None:
                raise request.error
            return request.answer

    def _all_wait(self) -> bool:
        if self._working or any(request is None for request in self._members.values()):
            return False
        left = self._until_deadline()
        if left is None:
            return True
        if left > 0:
            return False
        self._deadline = math.inf
        logger.warning(
            "merged: %d of %d clients of the cohort have come within %.0f s; the others join when "
            "they do. In a simulation let all run at once (--federation-config "
            "'client-resources-num-cpus=1 init-args-num-cpus=%d'), or set link.transport=messages",
            *(self._joined, self._cohort, self._patience, self._cohort),
        )
        return True

    def _until_deadline(self) -> float | None:
        """Seconds until nobody waits for the whole cohort any more; None if nobody does."""
        if self._deadline is None or math.isinf(self._deadline) or self._joined >= self._cohort:
            return None
        return max(0.0, self._deadline - time.monotonic())

    def _serve(self) -> None:
        """Have the first kind of request served; the others go on waiting."""
        self.waiting = {m: each for m, each in self._members.items() if each is not None}
        asked = self.waiting.values()
        kind = next(kind for kind in self._kinds if any(each.kind == kind for each in asked))
        # By name, so that the sums do not depend on the order of arrival.
        chosen = sorted((r for r in asked if r.kind == kind), key=lambda r: r.member.client)
        error: Exception | None = None
        with self._unlocked():
            try:
                self._work(kind, chosen)
            except Exception as caught:  # noqa: BLE001  half done, it must not be done again
                error = caught
        for request in chosen:
            if not request.done:  # else its member has left meanwhile
                request.error, request.done = error, True
            if self._members.get(request.member) is request:
                self._members[request.member] = None

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Let others change things meanwhile, but what is noted."""
        self._working = True
        self.changed.release()
        try:
            yield
        finally:
            self.changed.acquire()
            self._working, self.waiting = False, {}
            noted, self._noted = self._noted, []
            for change in noted:
                change()
            self.changed.notify_all()
