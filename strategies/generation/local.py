"""A trunk in the client's own process, without a wire: for tests, evaluations and baselines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from models.elsewhere import Crossed
from strategies.generation.engine import GenerationEngine
from strategies.generation.session import GenerationSession


class LocalTrunk:
    """Sessions of an engine in this process; see `models.elsewhere.RemoteTrunk`.

    Parameters
    ----------
    engine : GenerationEngine
    """

    def __init__(self, engine: GenerationEngine) -> None:
        self._engine, self._numbers = engine, itertools.count(1)

    def open(self, fork: str = "") -> LocalSession:
        """A session with nothing cached, or with what another one has."""
        name = f"local/{next(self._numbers)}"
        return LocalSession(self, self._engine, self._engine.open(name, fork=fork))


class LocalSession:
    """One cache of the engine; see `models.elsewhere.RemoteSession`."""

    def __init__(
        self, trunk: LocalTrunk, engine: GenerationEngine, session: GenerationSession
    ) -> None:
        self._trunk, self._engine, self._session = trunk, engine, session

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows: Sequence[int] = (),
        length: int = 0,
        keep: bool = True,
    ) -> Crossed:
        """Run the trunk on new positions, in as many pieces as it takes."""
        started, most, outputs = time.perf_counter(), self._engine.limits.tokens, []
        keep = keep or h_BTD.shape[1] > most  # pieces need what came before
        for begin in range(0, h_BTD.shape[1], most):
            piece = slice(begin, begin + most)
            output = self._session.forward(
                h_BTD[:, piece],
                mask_BT=None if mask_BT is None else mask_BT[:, piece],
                positions_BT=None if positions_BT is None else positions_BT[:, piece],
                rows=() if begin else rows,
                length=length + begin,
                keep=keep,
            )
            outputs.append(output)
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return Crossed(whole, seconds=time.perf_counter() - started, trips=len(outputs))

    def fork(self) -> LocalSession:
        """A session that begins with what this one has cached now."""
        return self._trunk.open(self._session.name)

    def close(self) -> None:
        """Let the engine forget it."""
        self._engine.close(self._session.name)
