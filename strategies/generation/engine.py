"""The trunk of one model that is served: sessions of generation, free of any transport."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import torch

from models.cached import PartCache
from models.parts import Part
from models.ragged import Ragged, Unbatchable
from strategies.engine.meter import SILENT, Meter
from strategies.errors import TrunkError
from strategies.generation.batcher import Batcher
from strategies.generation.memory import Limits, Memory
from strategies.generation.session import GONE, GenerationSession

logger = logging.getLogger(__name__)


class GenerationEngine:
    """Opens sessions on one trunk, and runs them.

    Parameters
    ----------
    trunk : Part
        In evaluation mode.
    limits : Limits
        What sessions may ask for; `length` 0 is the model's own.
    meter : Meter
        Told of the work.
    threads : int
        Torch threads of the trunk; 0: torch's own choice.
    memory : Memory, optional
        Shared with other engines of this process, if the limits are over all of them.

    Raises
    ------
    ValueError
        If a model of this family does not generate with a cache.

    Attributes
    ----------
    one_by_one : str
        Why single tokens of several sessions do not go together; empty if they do.
    """

    def __init__(
        self,
        trunk: Part,
        limits: Limits,
        *,
        meter: Meter = SILENT,
        threads: int = 0,
        memory: Memory | None = None,
    ) -> None:
        text = trunk.config.get_text_config(decoder=True)
        length = limits.length or getattr(text, "max_position_embeddings", None) or 0
        self.trunk, self.hidden_size = trunk.eval(), trunk.hidden_size
        self.limits = replace(limits, length=length)
        self.memory = memory or Memory(self.limits)
        self._meter, self.one_by_one = meter, ""
        ragged = None
        try:
            ragged = Ragged(trunk)
        except Unbatchable as error:
            self.one_by_one = str(error)
            logger.info("tokens of several sessions go one by one: %s", error)
        self._base, self._each = _measure(trunk)
        self._batcher = Batcher(trunk, ragged, meter, threads)
        self._sessions: dict[str, GenerationSession] = {}
        self._lock = threading.Lock()

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    @property
    def waiting(self) -> int:
        """Forwards that wait for the trunk."""
        return self._batcher.waiting

    @property
    def forwards(self) -> tuple[int, int]:
        """Forwards of the trunk so far, and the texts that went through them."""
        return self._batcher.forwards, self._batcher.texts

    def open(self, name: str, *, fork: str = "") -> GenerationSession:
        """Open a session.

        Parameters
        ----------
        name : str
            Its name, which no other session has.
        fork : str
            Another session, with whose cache it begins.

        Raises
        ------
        TrunkError
            Of kind `gone`, if the other is not there; `full`, if there is no room for it.
        """
        other = self._sessions.get(fork)
        if fork and other is None:
            raise TrunkError(f"session {fork} is not there", kind=GONE)
        session = self._new(name) if other is None else other.fork(name)
        with self._lock:
            if name in self._sessions:
                self.memory.leave(session)
                raise TrunkError(f"session {name} is open already", kind="order")
            self._sessions[name] = session
        self._meter.opened()
        return session

    def close(self, name: str) -> None:
        """End a session; one that is not there is ended already."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None:
            session.close()

    def stop(self) -> None:
        """End all sessions and the trunk's thread."""
        for name in list(self._sessions):
            self.close(name)
        self._batcher.stop()

    def _new(self, name: str) -> GenerationSession:
        return GenerationSession(
            name,
            self._batcher,
            self.memory,
            new_cache=self._new_cache,
            growth=self._growth,
            hidden_size=self.hidden_size,
            limits=self.limits,
        )

    def _new_cache(self) -> PartCache:
        return PartCache(self.trunk.config, self.trunk.blocks)

    def _growth(self, cache: PartCache | None, rows: int, new: int) -> int:
        row = self._base if cache is None else cache.bytes // max(1, cache.rows)
        return rows * (row + self._each * new)


def _measure(trunk: Part) -> tuple[int, int]:
    """Bytes of a cache's row: what it takes anyway, and for each position."""
    device, sizes = next(trunk.parameters()).device, []
    for length in (1, 2):
        cache = PartCache(trunk.config, trunk.blocks)
        try:
            with torch.no_grad():
                trunk(torch.zeros(1, length, trunk.hidden_size, device=device), cache=cache)
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:  # of a model's code
            raise ValueError(
                f"{trunk.config.model_type} cannot generate with its trunk elsewhere: its forward "
                f"with a cache does not run ({error})"
            ) from error
        sizes.append(cache.bytes)
    each = sizes[1] - sizes[0]
    return max(0, sizes[0] - each), each
