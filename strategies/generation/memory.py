"""How much memory the caches of all sessions may take, and who gives way when it is full."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

from strategies.errors import TrunkError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What sessions may ask for."""

    total_mb: float = 1024.0
    """MiB of keys and values, over all sessions."""
    session_mb: float = 512.0
    """MiB of one session."""
    rows: int = 64
    """Texts of one session: B."""
    tokens: int = 1024
    """New positions of one forward: T."""
    length: int = 0
    """Positions of a text; 0: as many as there is memory for."""
    idle: float = 5.0
    """Seconds after which a session may have to give way to others that need its memory."""


class Tenant(Protocol):
    """A session, as the memory knows it."""

    name: str
    used: float
    """When it was last at work, by `time.monotonic`."""

    def give_way(self) -> bool:
        """Drop what is cached; False if it is at work."""
        ...


class Memory:
    """Counts the bytes of each session.

    Parameters
    ----------
    limits : Limits
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.peak = 0
        """The most that they ever took together, bytes."""
        self._held: dict[Tenant, int] = {}
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """All sessions together."""
        return sum(list(self._held.values()))

    def of(self, tenant: Tenant) -> int:
        """Bytes of one session."""
        return self._held.get(tenant, 0)

    def take(self, tenant: Tenant, count: int) -> None:
        """Let a session hold `count` bytes from now on.

        Sessions that have been idle for a while give way, the longest idle first; their clients
        send them again when they go on.

        Raises
        ------
        TrunkError
            Of kind `full`, if that is too much for one, or there is no room.
        """
        own, total = self.limits.session_mb * MIB, self.limits.total_mb * MIB
        if count > own:
            raise TrunkError(
                f"this session would take {count / MIB:.4g} MiB of keys and values, one may take "
                f"{own / MIB:g}: shorten the text, ask for fewer beams or rows, or serve with a "
                "larger --session-kv-mb",
                kind="full",
            )
        with self._lock:
            over = self.bytes - self.of(tenant) + count - total
            if over > 0:
                over -= self._make_room(tenant, over)
            if over > 0:
                raise TrunkError(
                    f"the trunk holds {self.bytes / MIB:.4g} MiB of keys and values of "
                    f"{len(self._held)} sessions, and {count / MIB:.4g} for this one exceed "
                    f"{total / MIB:g}: try again later, or serve with a larger --kv-mb",
                    kind="full",
                )
            self._held[tenant] = count
            self.peak = max(self.peak, self.bytes)

    def leave(self, tenant: Tenant) -> None:
        """A session holds nothing any more."""
        with self._lock:
            self._held.pop(tenant, None)

    def _make_room(self, asking: Tenant, need: float) -> float:
        """Let idle sessions give way until `need` bytes are free; returns how many are."""
        free, before = 0.0, time.monotonic() - self.limits.idle
        for tenant in sorted(self._held, key=lambda each: each.used):
            if free >= need or tenant.used > before:
                break
            if tenant is not asking and self._held[tenant] and tenant.give_way():
                free += self._held.pop(tenant)
        return free
