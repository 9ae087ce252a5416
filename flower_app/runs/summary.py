"""What `summary.json` says of a run, and of who was missing in it; rounds are as in the journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conf.schema import Config
from flower_app.runs.epsilon import privacy_of
from flower_app.runs.lines import perplexity


def summarize(
    config: Config, rounds: Sequence[Mapping[str, Any]], seconds: float, *, cut_off: bool = False
) -> dict[str, Any]:
    """Return what the rounds of a run come to, `seconds` in all.

    `cut_off`: one more round was under way, in which something may have left its clients.
    """
    trained = [record for record in rounds if record["round"] > 0]
    losses = [loss for record in rounds if (loss := loss_of(record)) is not None]
    tokens = sum(record["tokens"] for record in trained)
    central = [loss for record in rounds if (loss := loss_of(record, "central")) is not None]
    missing, dropped = last_missing(rounds), times_dropped(rounds)
    noise = privacy_of(config, min(config.train.rounds, len(trained) + cut_off))
    return {
        "experiment": config.experiment,
        "rounds": len(trained),
        "clients": len({name for record in rounds for name in record["clients"]}),
        "strategy": config.train.strategy,
        "eval_loss_first": losses[0] if losses else None,
        "eval_loss_last": losses[-1] if losses else None,
        "eval_perplexity_last": perplexity(losses[-1]) if losses else None,
        **_of_central(central),
        **_best(trained, "central" if config.data.central_path else "evaluate"),
        "tokens": tokens,
        "bytes_up": sum(record["bytes_up"] for record in rounds),
        "bytes_down": sum(record["bytes_down"] for record in rounds),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 3) if seconds else 0.0,
        **({"privacy": noise} if noise else {}),
        **({"missing": missing} if missing else {}),
        **({"dropped": dropped} if dropped else {}),
        **({"anomalies": odd} if (odd := times_odd(rounds)) else {}),
    }


def loss_of(record: Mapping[str, Any], of: str = "evaluate") -> float | None:
    """Return a round's held-out loss, or that of its `central` evaluation."""
    loss: float | None = (record.get(of) or {}).get("loss")
    return loss


def _of_central(losses: Sequence[float]) -> dict[str, float]:
    if not losses:
        return {}
    return {
        "central_loss_first": losses[0],
        "central_loss_last": losses[-1],
        "central_perplexity_last": perplexity(losses[-1]),
    }


def _best(trained: Sequence[Mapping[str, Any]], of: str) -> dict[str, Any]:
    """The trained round of the lowest loss: of the central evaluation, if there is one."""
    known = [(loss, r["round"]) for r in trained if (loss := loss_of(r, of)) is not None]
    if not known:
        return {}
    loss, number = min(known)
    return {"best_loss": loss, "best_round": number}


def turnouts(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return who was asked, answered and was dropped: abandoned attempts, training, evaluation."""
    evaluation = record.get("evaluation")
    return [*record.get("abandoned", ()), record, *([evaluation] if evaluation else [])]


def times_dropped(rounds: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return how often each client was asked in vain, the most often first.

    Those not needed are included: whoever is always too slow never counts.
    """
    names = (
        name for record in rounds for turnout in turnouts(record) for name in turnout["missing"]
    )
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def times_odd(rounds: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return in how many rounds each client's update stood out, the most often first."""
    names = Counter(name for record in rounds for name in record.get("anomalies", ()))
    return dict(sorted(names.items(), key=lambda item: (-item[1], item[0])))


def last_missing(rounds: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return who was missing in the last round, and why; training goes before evaluation."""
    if not rounds:
        return {}
    last = rounds[-1]
    return {**(last.get("evaluation") or {}).get("missing", {}), **last["missing"]}
