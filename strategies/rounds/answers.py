"""What clients answer to a train or evaluate message, and what of it is believed."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from strategies.records import ARRAYS, METRICS, OUTCOME, from_arrays

UNREADABLE = (
    KeyError, TypeError, ValueError, AssertionError, OverflowError,
    EOFError, OSError, zipfile.BadZipFile, MemoryError,
)  # fmt: skip
"""What a reply that a client made up can end in when it is read: NumPy's own errors among them."""

MOST = {"loss": 1e6}
"""Largest counters that are believed; all others below 2**53, up to which floats count."""

COUNTERS = ("num-tokens", "loss", "steps", "bytes-up", "bytes-down")
"""What the metrics of an answer hold: finite numbers."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one client answered: its tensors and metrics, or the reason why there are none."""

    key: str
    client: str
    state: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""


def read_answer(key: str, reply: Message, node: str) -> Answer:
    """Read one client's reply; anything that does not hold together becomes its `error`."""
    if reply.has_error():
        return Answer(key=key, client=node, error=reply.error.reason or str(reply.error.code))
    try:
        return _read(key, reply)
    except UNREADABLE as error:
        return Answer(
            key=key, client=node, error=f"its reply is not one of Graft's: {error!r:.200}"
        )


def error_of(reply: Message) -> str:
    """The reason that a reply gives for having no result; empty if it gives none."""
    if reply.has_error():
        return ""
    return str(reply.content.config_records.get(OUTCOME, {}).get("error", ""))


def _read(key: str, reply: Message) -> Answer:
    content = reply.content
    outcome = content.config_records[OUTCOME]
    client = str(outcome["client"])
    if outcome["error"]:
        return Answer(key=key, client=client, error=str(outcome["error"]))
    record: Mapping[str, Any] = content.metric_records[METRICS]
    metrics = {name: float(record[name]) for name in COUNTERS}
    state = from_arrays(content.array_records[ARRAYS]) if ARRAYS in content.array_records else {}
    answer = Answer(key=key, client=client, state=state, metrics=metrics)
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        return replace(answer, error=f"it reports {wrong[0]}={metrics[wrong[0]]}")
    for name, value in metrics.items():
        if not 0 <= value < MOST.get(name, 2.0**53):
            return replace(answer, error=f"it reports {name}={value:g}")
    if metrics["num-tokens"] <= 0:
        return replace(answer, error="it reports no token")
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:  # as all that is trained travels; others may overflow
            return replace(answer, error=f"its '{name:.80}' is {tensor.dtype}, not torch.float32")
        if not torch.isfinite(tensor).all():
            return replace(answer, error=f"its '{name}' holds values that are not finite")
    return answer


def mismatches(answers: Sequence[Answer], sent: Mapping[str, Tensor]) -> dict[str, str]:
    """Which answers cannot be averaged with the others, by key, and why.

    The names and shapes that were sent are the right ones; in the first round, when nothing was
    sent, those that most clients have.
    """
    forms = {answer.key: _form(answer.state) for answer in answers}
    if not forms:
        return {}
    right = _form(sent) if sent else Counter(forms.values()).most_common(1)[0][0]
    return {
        key: f"its tensors differ from the others' in {sorted(dict(form ^ right))[:3]}"
        for key, form in forms.items()
        if form != right
    }


def _form(state: Mapping[str, Tensor]) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((name, tuple(tensor.shape)) for name, tensor in state.items())
