"""The numbers of one run, as plain data: what every form of a report is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from flower_app.runs.history import History, Record
from flower_app.runs.lines import perplexity
from flower_app.runs.summary import times_odd
from simulations.report.commands import commands
from simulations.report.curves import add_axes, client_curves, round_curve, train_curve
from simulations.report.participation import Asking, askings
from simulations.report.settings import changed, flat

PHASES = ("bottom", "network", "trunk", "top")
PARTS = ("startup", *PHASES, "evaluation", "rest")
"""Of a round: until the first step begins, a client's mean time in each phase, the evaluation, and
what is left of the round."""

Run = dict[str, Any]


def describe(history: History) -> Run:
    """Return all that a report says of a run.

    Returns
    -------
    dict
        `summary`, `rounds`, `clients`, `client_rounds`, `participation`, `steps` by column,
        `curves` thinned for a page, configuration, environment, commands and notes: JSON.
    """
    add_axes(history)
    asked = askings(history)
    rounds = _rounds(history)
    client_rounds = _client_rounds(history, asked)
    clients = _clients(history, asked, client_rounds)
    config = flat(history.config)
    return {
        "name": history.folder.name,
        "folder": str(history.folder),
        "experiment": history.config.get("experiment", ""),
        "seed": config.get("seed"),
        "status": history.status,
        "error": (history.summary or {}).get("error", ""),
        "model": history.model,
        "started": history.started.isoformat() if history.started else None,
        "resumed_after": [record["round"] for record in history.resumes],
        "summary": _summary(history, rounds, clients),
        "rounds": rounds,
        "clients": clients,
        "client_rounds": client_rounds,
        "participation": [each.told() for each in asked],
        "steps": _columns(history.steps),
        "curves": _curves(history, rounds, client_rounds),
        "config": config,
        "changed": changed(history.config),
        "environment": history.environment,
        "commands": commands(history, len(clients)),
        "notes": _notes(history),
    }


def _summary(history: History, rounds: Sequence[Record], clients: Sequence[Record]) -> Record:
    """Of what is on record; a run that has not ended has no other summary."""
    losses = [(each["heldout_loss"], each["round"]) for each in rounds]
    known = [(loss, number) for loss, number in losses if loss is not None]
    best = min(known, default=(None, None))
    tokens = sum(each["tokens"] for each in rounds)
    seconds = (history.summary or {}).get("seconds") or history.seconds
    adapted = (history.summary or {}).get("adapted") or {}
    return {
        "rounds": sum(each["round"] > 0 for each in rounds),
        "planned": history.planned,
        "clients": len(clients),
        "heldout_first": known[0][0] if known else None,
        "heldout_last": known[-1][0] if known else None,
        "heldout_best": best[0],
        "best_round": best[1],
        "perplexity_first": perplexity(known[0][0]) if known else None,
        "perplexity_last": perplexity(known[-1][0]) if known else None,
        "train_last": next((r["train_loss"] for r in rounds[::-1] if r["train_loss"]), None),
        "tokens": tokens,
        "bytes_up": sum(each["bytes_up"] for each in rounds),
        "bytes_down": sum(each["bytes_down"] for each in rounds),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "server_peak_mb": max((m for r in rounds if (m := r["server_peak_mb"])), default=None),
        "client_peak_mb": max((m for c in clients if (m := c["peak_mb"])), default=None),
        "adapted": adapted,
    }


def _rounds(history: History) -> list[Record]:
    steps: dict[int, list[Record]] = defaultdict(list)
    for step in history.steps:
        steps[step["round"]].append(step)
    asked = {record["round"]: record["at"] for record in history.asked if record["training"]}
    return [
        _round(record, steps[record["round"]], asked.get(record["round"]))
        for record in history.rounds
    ]


def _round(record: Record, steps: Sequence[Record], asked: float | None) -> Record:
    loss = (record.get("evaluate") or {}).get("loss")
    memory = record.get("memory") or {}
    told = record.get("per_client") or {}
    peaks = [p for each in told.values() if (p := _peak(each))]
    return {
        "round": record["round"],
        "at": record["at"],
        "seconds": record.get("seconds") or 0.0,
        "train_loss": (record.get("train") or {}).get("loss"),
        "heldout_loss": loss,
        "central_loss": (record.get("central") or {}).get("loss"),
        "perplexity": None if loss is None else perplexity(loss),
        "tokens": record.get("tokens") or 0,
        "bytes_up": record.get("bytes_up") or 0,
        "bytes_down": record.get("bytes_down") or 0,
        "asked": len(record.get("asked") or ()),
        "answered": len(record.get("clients") or ()),
        "attempts": record.get("attempts", 1),
        **{key: record[key] for key in ("steps_so_far", "tokens_so_far", "mb_so_far")},
        **{f"{part}_seconds": value for part, value in _parts(record, steps, asked).items()},
        "server_mb": memory.get("server_mb"),
        "server_peak_mb": memory.get("server_peak_mb"),
        "gpu_peak_mb": memory.get("gpu_peak_mb"),
        "client_peak_mb": max(peaks, default=None),
    }


def _peak(told: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The most memory that a client says its process took, in MB."""
    return max((p for each in told.values() if (p := each.get("peak-memory-mb"))), default=None)


def _parts(record: Record, steps: Sequence[Record], asked: float | None) -> dict[str, float]:
    """Seconds of a round by `PARTS`; `asked` is when the attempt that counts began, if known."""
    by_client: dict[str, list[Record]] = defaultdict(list)
    for step in steps:
        by_client[step["client"]].append(step.get("seconds") or {})
    begun = [step["at"] - sum((step.get("seconds") or {}).values()) for step in steps]
    known = asked is not None and begun
    parts = {"startup": max(0.0, min(begun) - asked) if known and asked is not None else 0.0}
    parts |= {
        phase: fmean(sum(each.get(phase, 0.0) for each in own) for own in by_client.values())
        if by_client
        else 0.0
        for phase in PHASES
    }
    seconds = record.get("seconds") or 0.0
    parts["evaluation"] = record["at"] - record["trained_at"] if "trained_at" in record else 0.0
    if record["round"] == 0:
        parts["evaluation"] = seconds
    return parts | {"rest": max(0.0, seconds - sum(parts.values()))}


def _client_rounds(history: History, asked: Sequence[Asking]) -> list[Record]:
    """A row for each round and client that was asked to train, or took a step."""
    steps: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for step in history.steps:
        steps[step["round"], step["client"]].append(step)
    told = {record["round"]: record.get("per_client") or {} for record in history.rounds}
    trained = {each.round: each for each in asked if each.training}  # the last attempt
    places = {(each.round, name) for each in trained.values() for name in each.asked}
    evaluated = {(n, name) for n, each in told.items() for name in each}
    return [
        _client_round(place, steps[place], told.get(place[0], {}).get(place[1], {}), trained)
        for place in sorted(places | set(steps) | evaluated)
    ]


def _client_round(
    place: tuple[int, str],
    steps: Sequence[Record],
    told: Mapping[str, Mapping[str, Any]],
    trained: Mapping[int, Asking],
) -> Record:
    number, client = place
    train, evaluate = told.get("train") or {}, told.get("evaluate") or {}
    asking = trained.get(number)
    tokens = sum(step.get("tokens") or 0 for step in steps)
    losses = [(s["loss"], s.get("tokens") or 1) for s in steps if s.get("loss") is not None]
    mean = sum(loss * n for loss, n in losses) / sum(n for _, n in losses) if losses else None
    seconds = [step.get("seconds") or {} for step in steps]
    return {
        "round": number,
        "client": client,
        "outcome": asking.outcome(client) if asking else "not asked",
        "why": asking.missing.get(client, "") if asking else "",
        "steps": len(steps),
        "tokens": train.get("num-tokens", tokens),
        "train_loss": train.get("loss", mean),
        "last_loss": losses[-1][0] if losses else None,
        "bytes_up": sum(step.get("bytes_up") or 0 for step in steps),
        "bytes_down": sum(step.get("bytes_down") or 0 for step in steps),
        **{f"{p}_seconds": sum(each.get(p, 0.0) for each in seconds) for p in PHASES},
        "heldout_loss": evaluate.get("loss"),
        "heldout_tokens": evaluate.get("num-tokens"),
        "peak_mb": _peak(told),
    }


def _clients(history: History, asked: Sequence[Asking], rows: Sequence[Record]) -> list[Record]:
    names = {name for each in asked for name in each.asked} | {row["client"] for row in rows}
    own: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        own[row["client"]].append(row)
    odd = times_odd(history.rounds)
    return [_client(name, asked, own[name], odd) for name in sorted(names)]


def _client(
    name: str, asked: Sequence[Asking], rows: Sequence[Record], odd: Mapping[str, int]
) -> Record:
    steps = sum(row["steps"] for row in rows)
    busy = sum(row[f"{phase}_seconds"] for row in rows for phase in PHASES)
    heldout = [row["heldout_loss"] for row in rows if row["heldout_loss"] is not None]
    losses = [row["last_loss"] for row in rows if row["last_loss"] is not None]
    return {
        "client": name,
        "asked": sum(name in each.asked for each in asked),
        "answered": sum(each.outcome(name) == "answered" for each in asked),
        "missing": sum(name in each.missing for each in asked),
        "stood_out": odd.get(name, 0),
        "steps": steps,
        "tokens": sum(row["tokens"] for row in rows if row["outcome"] == "answered"),
        "bytes_up": sum(row["bytes_up"] for row in rows),
        "bytes_down": sum(row["bytes_down"] for row in rows),
        "seconds_per_step": busy / steps if steps else None,
        "train_loss": losses[-1] if losses else None,
        "heldout_loss": heldout[-1] if heldout else None,
        "peak_mb": max((row["peak_mb"] for row in rows if row["peak_mb"]), default=None),
    }


def _columns(steps: Sequence[Record]) -> dict[str, list[Any]]:
    names = ["round", "client", "step", "at", "loss", "grad_norm", "lr", "tokens"]
    names += ["bytes_up", "bytes_down", "steps_so_far", "tokens_so_far", "mb_so_far"]
    columns = {name: [step.get(name) for step in steps] for name in names}
    phases = {f"{p}_seconds": [(s.get("seconds") or {}).get(p) for s in steps] for p in PHASES}
    return columns | phases


def _curves(history: History, rounds: list[Record], rows: list[Record]) -> Record:
    places = {each["round"]: each for each in rounds}
    names = sorted({row["client"] for row in rows if row["heldout_loss"] is not None})
    own = {
        name: [places[row["round"]] | {"own": row["heldout_loss"]} for row in rows
               if row["client"] == name and row["round"] in places]
        for name in names
    }  # fmt: skip
    return {
        "train": train_curve(history),
        "heldout": round_curve(rounds, "heldout_loss"),
        "central": round_curve(rounds, "central_loss"),
        "clients": client_curves(history),
        "clients_heldout": {name: round_curve(points, "own") for name, points in own.items()},
    }


def _notes(history: History) -> list[str]:
    """What a reader must know of the record."""
    notes = []
    if history.damaged:
        count = len(history.damaged)
        what = (
            "1 line of metrics.jsonl is no record and is"
            if count == 1
            else (f"{count} lines of metrics.jsonl are no records and are")
        )
        notes.append(f"{what} passed over; the first is line {history.damaged[0]}.")
    if history.estimated:
        notes.append(
            "An earlier Graft wrote this record, without instants: times are sums of durations."
        )
    if not history.config:
        notes.append("config.yaml is missing or cannot be read: nothing is known of the settings.")
    return notes
