"""The trunk in the client's own process: a `Link` without a wire, for tests and baselines."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Unpack

from torch import Tensor

from strategies.engine.lane import StepResult
from strategies.engine.session import Session
from strategies.transport.link import OfBack, OfCompute, StepCounters


class LocalLink:
    """A session of an engine in this process: no copies. What is asked for is done at once."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._computed: deque[Tensor] = deque()
        self._gradients: deque[tuple[Tensor | None, float]] = deque()
        self._applied: deque[StepResult] = deque()
        self.bytes_up = self.bytes_down = 0
        self.trunk_seconds = 0.0

    def compute(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfCompute]
    ) -> None:
        """See `Session.compute`."""
        wanted = not how.get("frozen", False)
        self._computed.append(self._session.compute(step, micro, h_BTD, mask_BT, wanted=wanted))

    def computed(self) -> Tensor:
        """The output of the first `compute` that was not taken."""
        return self._computed.popleft()

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfBack]
    ) -> None:
        """See `Session.backward`."""
        done = self._session.backward(step, micro, grad_BTD, **how)
        self._gradients.append(done)

    def gradients(self) -> tuple[Tensor | None, float]:
        """The result of the first `backward` that was not taken."""
        return self._gradients.popleft()

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        """See `Session.apply`."""
        done = self._session.apply(
            step,
            client_square_norm=counters.client_square_norm,
            tokens=counters.tokens,
            gradients=gradients,
        )
        self._applied.append(done)

    def applied(self) -> StepResult:
        """The result of the first `apply` that was not taken."""
        return self._applied.popleft()

    def close(self) -> None:
        """Leave the session; its replica waits for the end of the round."""
        self._session.close()
