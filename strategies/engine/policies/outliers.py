"""What `train.outlier_clip` cuts: a client's share of a merged step that is far above the median.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from strategies.engine.member import Member
from strategies.engine.policies.meeting import Request

if TYPE_CHECKING:
    from torch import Tensor

FEWEST = 3
"""Of two clients, nobody can say which one is too large."""


class Outliers:
    """Bounds each client's gradients by the cohort's median.

    What is compared is the norm of the sum over a client's tokens, divided by the root of their
    number: alike for honest clients, however long their micro-batches are. Of the trunk it is the
    gradient that the client sends, dL/dh2, on which its share depends linearly: the share itself
    would cost a backward for each client.

    Parameters
    ----------
    most : float
        In multiples of the median; 0: nothing is cut.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._usual: dict[str, float] = {}
        """The last median of each kind: who comes alone is held to it."""
        self._last: dict[str, int] = {}
        self.cut: dict[str, dict[str, float]] = {}
        """By client, in how many steps something was cut, and by how much at most."""

    def cut_backwards(self, step: int, requests: Iterable[Request]) -> None:
        """Cut the dL/dh2 (B, T, D) of all that wait for a backward."""
        waiting = [r for r in requests if r.kind.endswith("backward") and r.payload[0] is not None]
        norms = {r.member: _norm([r.payload[0]], r.payload[1]) for r in waiting if self._most}
        factors = self._factors("dL/dh2", step, norms)
        for request in waiting:
            if (factor := factors.get(request.member)) is not None and not request.gone_back:
                grad_BTD, tokens = request.payload
                request.payload = grad_BTD * factor, tokens

    def cut_steps(
        self, step: int, requests: Iterable[Request]
    ) -> list[tuple[float, int, Mapping[str, Tensor]]]:
        """Square norm, tokens and gradients of the ends for the common step, cut."""
        told: dict[Member, tuple[float, int, Any]] = {r.member: r.payload for r in requests}
        norms = {
            member: _norm(own.values(), tokens) if own else math.sqrt(square * tokens)
            for member, (square, tokens, own) in told.items()
            if self._most and tokens
        }
        for member, factor in self._factors("ends", step, norms).items():
            square, tokens, own = told[member]
            own = {name: gradient * factor for name, gradient in own.items()}
            told[member] = square * factor**2, tokens, own
        return list(told.values())

    def _factors(self, what: str, step: int, norms: Mapping[Member, float]) -> dict[Member, float]:
        """By what those are multiplied that are too large."""
        some = [norm for norm in norms.values() if norm > 0]
        if len(some) >= FEWEST:
            self._usual[what] = statistics.median(some)
        if not (usual := self._usual.get(what)):
            return {}
        most = self._most * usual
        found = {member: most / norm for member, norm in norms.items() if norm > most}
        for member in found:
            self._count(member.client, step, norms[member] / usual)
        return found

    def _count(self, client: str, step: int, times: float) -> None:
        told = self.cut.setdefault(client, {"clipped": 0.0, "clipped_times": 0.0})
        told["clipped"] += self._last.get(client) != step
        told["clipped_times"] = max(told["clipped_times"], times)
        self._last[client] = step


def _norm(gradients: Iterable[Tensor], tokens: int) -> float:
    """Of a mean over tokens, as that of their sum divided by the root of their number."""
    return float(torch.nn.utils.get_total_norm(list(gradients))) * math.sqrt(tokens)
