"""One client's text on the trunk: what is cached of it, and the forwards that go on from there.

Shapes: B rows, L positions that are cached, T new ones, D hidden size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.cached import PartCache
from strategies.engine.checks import check_finite
from strategies.errors import TrunkError
from strategies.generation.batcher import Batcher, Job
from strategies.generation.memory import Limits, Memory

GONE = "gone"
"""The kind of error of a session whose cache is not there: its client sends it again."""

OVERFLOW = (
    "this model overflows in the type it is computed in or travels in: serve it with --dtype fp32 "
    "and --trunk-dtype fp32"
)
"""About numbers that are not finite."""


class GenerationSession:
    """What one cache of a client is on the trunk.

    Parameters
    ----------
    name : str
        Of the session, for errors.
    batcher : Batcher
        Runs the forwards.
    memory : Memory
        Where its bytes are counted.
    new_cache : callable
        Makes an empty cache.
    growth : callable
        Bytes that a cache (None: an empty one) takes with so many rows and new positions, at most.
    hidden_size : int
        D.
    limits : Limits
        What it may ask for.
    """

    def __init__(
        self,
        name: str,
        batcher: Batcher,
        memory: Memory,
        *,
        new_cache: Callable[[], PartCache],
        growth: Callable[[PartCache | None, int, int], int],
        hidden_size: int,
        limits: Limits,
    ) -> None:
        self.name, self.used = name, time.monotonic()
        self._batcher, self._memory, self._growth = batcher, memory, growth
        self._new_cache, self._hidden_size, self._limits = new_cache, hidden_size, limits
        self._cache = new_cache()
        self._mask_BL: Tensor | None = None
        """None: no padding anywhere."""
        self._gone = ""
        self.queued = 0.0
        """Seconds that the last forward waited for the trunk."""
        self._busy = threading.Lock()

    @property
    def length(self) -> int:
        """L."""
        return self._cache.length

    @property
    def bytes(self) -> int:
        """What is cached."""
        return self._memory.of(self)

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows: Sequence[int] = (),
        length: int = 0,
        keep: bool = True,
    ) -> Tensor:
        """Run the trunk on new positions; see `models.elsewhere.RemoteSession`.

        Returns
        -------
        Tensor
            (B, T, D), on the CPU.

        Raises
        ------
        TrunkError
            Of kind `gone`, if what is to go on is not there any more; `full`, if it would take too
            much memory; `shape`, `order` or `not-finite`, if it makes no sense.
        """
        with self._busy:
            self.used = time.monotonic()
            self._check(h_BTD, mask_BT, positions_BT, rows, length, keep)
            check_finite(h_BTD, "h1", advice=OVERFLOW)
            if not keep:
                mask = None if mask_BT is None else mask_BT.long()
                return self._run(Job(h_BTD, mask, positions_BT, None, False))
            return self._go_on(h_BTD, mask_BT, positions_BT, rows, length)

    def _go_on(
        self,
        h_BTD: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor | None,
        rows: Sequence[int],
        length: int,
    ) -> Tensor:
        B, T = h_BTD.shape[:2]
        self._memory.take(self, self._growth(self._cache if length else None, B, T))
        try:
            self._set_back(rows, length)
            mask = self._masked(mask_BT, B, T)
            single = (B, T) == (1, 1) and length > 0 and self._mask_BL is None
            single = single and positions_BT is None
            job = Job(h_BTD, mask, positions_BT, self._cache, single)
            output_BTD = self._run(job)
        except BaseException:  # half done: nobody can go on from here
            self._drop("what it had cached was lost by an error")
            raise
        self._memory.take(self, self._cache.bytes)
        self.used = time.monotonic()
        return output_BTD

    def _run(self, job: Job) -> Tensor:
        output_BTD = self._batcher.run(job).cpu()
        self.queued = job.queued
        return output_BTD

    def _set_back(self, rows: Sequence[int], length: int) -> None:
        """Let the cache be what the client has it be."""
        if length == 0:
            self._cache, self._mask_BL = self._new_cache(), None
            return
        try:
            self._cache.keep(rows, length)
        except ValueError as error:
            raise TrunkError(f"it cannot be set back to {length}: {error}", kind=GONE) from error
        if self._mask_BL is not None:
            self._mask_BL = self._mask_BL[:, :length]
            if rows:
                self._mask_BL = self._mask_BL[list(rows)]

    def _masked(self, mask_BT: Tensor | None, B: int, T: int) -> Tensor | None:
        """The mask of all positions (B, L + T), the new ones added; None: no padding."""
        length = self._cache.length
        if mask_BT is None and self._mask_BL is None:
            return None
        old_BL = self._mask_BL
        if old_BL is None:
            old_BL = torch.ones(B, length, dtype=torch.bool)
        new_BT = torch.ones(B, T, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        self._mask_BL = torch.cat([old_BL, new_BT], 1)
        if not self._cache.attends:  # a recurrent state has taken in what was masked before
            return None if mask_BT is None else mask_BT.long()
        return self._mask_BL.long()

    def fork(self, name: str) -> GenerationSession:
        """Another session that begins with what is cached now, in memory of its own.

        Raises
        ------
        TrunkError
            Of kind `gone`, or `full`.
        """
        with self._busy:
            self._check_there()
            other = GenerationSession(
                name,
                self._batcher,
                self._memory,
                new_cache=self._new_cache,
                growth=self._growth,
                hidden_size=self._hidden_size,
                limits=self._limits,
            )
            self._memory.take(other, self._cache.bytes)
            other._cache, other._mask_BL = self._cache.copy(), self._mask_BL
            return other

    def give_way(self) -> bool:
        """Drop what is cached, as others need the memory, unless it is at work now."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            self._forget("others needed its memory while it was idle")
            return True
        finally:
            self._busy.release()

    def close(self) -> None:
        """Drop what is cached, once it is not at work; a second call does nothing."""
        with self._busy:
            self._drop("it was closed")

    def _drop(self, why: str) -> None:
        self._forget(why)
        self._memory.leave(self)

    def _forget(self, why: str) -> None:
        self._gone = self._gone or why
        self._cache, self._mask_BL = self._new_cache(), None

    def _check_there(self) -> None:
        if self._gone:
            raise TrunkError(f"session {self.name} is not there: {self._gone}", kind=GONE)

    def _check(
        self,
        h_BTD: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor | None,
        rows: Sequence[int],
        length: int,
        keep: bool,
    ) -> None:
        """The one place where a forward is believed or not."""
        self._check_there()
        self.check_shape(tuple(h_BTD.shape), len(rows), length)
        B, T = h_BTD.shape[:2]
        for name, tensor in (("mask", mask_BT), ("positions", positions_BT)):
            if tensor is not None and tensor.shape != (B, T):
                raise TrunkError(
                    f"{name} have shape {tuple(tensor.shape)}, not {(B, T)}", kind="shape"
                )
        if length and any(not 0 <= row < self._cache.rows for row in rows):
            raise TrunkError(
                f"rows {min(rows)} to {max(rows)} are to go on, there are {self._cache.rows}",
                kind="shape",
            )
        if positions_BT is not None and not self._are_positions(positions_BT):
            raise TrunkError("positions are beyond what the model has", kind="shape")
        if not keep and length:
            raise TrunkError("a forward that goes on from a cache must keep it", kind="order")

    def check_shape(self, shape: tuple[int, ...], rows: int, length: int) -> None:
        """Refuse a forward by the shape of its activations, before anything is made of them."""
        limits = self._limits
        if len(shape) != 3 or shape[2] != self._hidden_size or 0 in shape:
            raise TrunkError(
                f"activations have shape {shape}; the trunk takes (B, T, {self._hidden_size})",
                kind="shape",
            )
        B, T = shape[:2]
        if limits.rows < B or limits.tokens < T:
            raise TrunkError(
                f"{B} rows of {T} new positions came; at most {limits.rows} of {limits.tokens} are "
                "accepted at once",
                kind="shape",
            )
        if not 0 <= length <= self._cache.length:
            raise TrunkError(
                f"{length} cached positions are to go on, {self._cache.length} are there", kind=GONE
            )
        if length and (rows or self._cache.rows) != B:
            raise TrunkError(
                f"{B} rows came, {rows or self._cache.rows} rows of the cache are to go on",
                kind="shape",
            )
        if limits.length and length + T > limits.length:
            raise TrunkError(
                f"the text would have {length + T} positions; the model has {limits.length}",
                kind="shape",
            )

    def _are_positions(self, positions_BT: Tensor) -> bool:
        most = self._limits.length or 2**31
        return int(positions_BT.min()) >= 0 and int(positions_BT.max()) < most
