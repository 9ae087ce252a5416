"""The loss by which a run is judged: which round is the best, and whether training still helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from strategies.events import Stopped


class Losses:
    """The loss of each round: on the server's own file if there is one, else on held-out examples.

    All of it follows from the rounds that were recorded, so that a resumed run judges alike.

    Parameters
    ----------
    patience : int
        Evaluated rounds in a row without a lower loss after which the run ends; 0: never.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._by_round: dict[int, float] = {}

    def add(self, number: int, loss: float | None) -> bool:
        """Take note of a round's loss; returns whether it is the lowest of a trained model.

        A round that nobody evaluated, or whose loss is no number, is none.
        """
        self._by_round.pop(number, None)
        if loss is None or not math.isfinite(loss):
            return False
        self._by_round[number] = loss
        return number == self.best

    def of(self, number: int) -> float | None:
        """A round's loss."""
        return self._by_round.get(number)

    @property
    def best(self) -> int | None:
        """The round of the lowest loss, the first of several; None without one after training."""
        trained = [number for number in self._by_round if number]
        return min(trained, key=lambda number: (self._by_round[number], number), default=None)

    def stops(self, number: int, rounds: int, asked: Callable[[], bool] = bool) -> Stopped | None:
        """Say whether the run ends after round `number` of so many; `asked`: if others want it."""
        why = self._exhausted()
        if number < rounds and (why or asked()):
            return Stopped(round=number, rounds=rounds, why=why)
        return None

    def _exhausted(self) -> str:
        """Why training is over; empty if it is to go on."""
        if not self._patience or not self._by_round:
            return ""
        lowest = min(self._by_round, key=lambda number: (self._by_round[number], number))
        since = sum(number > lowest for number in self._by_round)
        if since < self._patience:
            return ""
        return (
            f"the loss has not fallen below {self._by_round[lowest]:.4f} of round {lowest} for "
            f"{since} rounds (train.patience={self._patience})"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"losses": dict(self._by_round)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""
        self._by_round = {int(number): loss for number, loss in state["losses"].items()}
