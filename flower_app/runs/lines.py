"""The words of a run's lines: of a step, a round, the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from strategies.events import anomaly_words

NAMED = 8
"""Clients that a line names; the others are counted."""

_LOSSES = (("train", "train"), ("held-out", "evaluate"), ("central", "central"))


def step_line(record: Mapping[str, Any], rounds: int) -> str:
    """Return the line of a step, as in the journal; its rate counts its compute and network."""
    return (
        f"  round {record['round']}/{rounds}  {record['client']}"
        f"  step {record['step']:>4}/{record['steps']}"
        f"  loss {record['loss']:.4f}  |g| {record['grad_norm']:.3g}  lr {record['lr']:.2g}"
        f"  {_rate(record['tokens'], sum(record['seconds'].values()))}"
    )


def adapted_line(shares: Mapping[str, float]) -> str:
    """Return the line that tells which share of each part's weights has an adapter."""
    told = ", ".join(f"{share:.0%} of the {role}" for role, share in shares.items())
    return f"weights with LoRA adapters: {told}"


def round_line(record: Mapping[str, Any], rounds: int) -> str:
    """Return the line of a round, as in the journal; its rate counts evaluation too."""
    parts = [f"round {record['round']}/{rounds}" if record["round"] else "before training"]
    for name, key in _LOSSES:
        loss = (record.get(key) or {}).get("loss")
        if loss is not None:
            parts.append(f"{name} loss {loss:.4f} (perplexity {perplexity(loss):.4g})")
    if record["tokens"]:
        parts.append(_rate(record["tokens"], record["seconds"]))
    parts.append(_traffic(record))
    parts.append(f"{record['seconds']:.1f} s")
    parts.append(_clients(record))
    for label, missing in _all_missing(record):
        if missing:
            parts.append(f"{label}: {_reasons(missing)}")
    if odd := record.get("anomalies"):
        words = {client: anomaly_words(told) for client, told in odd.items()}
        parts.append(f"stands out: {_reasons(words)}")
    return " | ".join(parts)


def ended_line(summary: Mapping[str, Any]) -> str:
    """Return the line of a run that is finished, or was stopped, of its summary."""
    first, last = summary["eval_loss_first"], summary["eval_loss_last"]
    loss = "not evaluated" if last is None else f"held-out loss {first:.4f} -> {last:.4f}"
    return (
        f"{summary['status']}: {loss}, {summary['tokens']:,} tokens, {_traffic(summary)}, "
        f"{summary['seconds']:.0f} s"
    )


def perplexity(loss: float) -> float:
    """Return e to the loss in nats per token, without an overflow."""
    return math.exp(min(loss, 700.0))


def _clients(record: Mapping[str, Any]) -> str:
    clients, asked = record["clients"], len(record["asked"])
    counted = "" if len(clients) == asked <= NAMED else f" {len(clients)} of {asked}"
    return f"clients{counted}: {_names(clients)}"


def _all_missing(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, str]]]:
    """Labels and reasons: of attempts that were undone, of the training, of the evaluation."""
    undone = [
        (f"attempt {number} had no quorum, missing", turnout["missing"])
        for number, turnout in enumerate(record.get("abandoned", ()), start=1)
    ]
    later = (record.get("evaluation") or {}).get("missing", {})
    return [*undone, ("missing", record["missing"]), ("missing in the evaluation", later)]


def _reasons(missing: Mapping[str, str]) -> str:
    """Names by reason, `NAMED` of them at most."""
    by_reason: dict[str, list[str]] = {}
    for name in sorted(missing)[:NAMED]:
        by_reason.setdefault(missing[name], []).append(name)
    told = [f"{', '.join(names)} ({why})" for why, names in by_reason.items()]
    return ", ".join(told) + _rest(len(missing))


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + _rest(len(names)) if names else "nobody"


def _rest(count: int) -> str:
    return f" and {count - NAMED} more" if count > NAMED else ""


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else "- tokens/s"


def _traffic(record: Mapping[str, Any]) -> str:
    return f"{record['bytes_up'] / 1e6:.1f} MB up, {record['bytes_down'] / 1e6:.1f} MB down"
