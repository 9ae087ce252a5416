"""Curves of a run along five axes, and thinned so that a page of a long run stays small."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flower_app.runs.history import History

AXES = ("steps", "rounds", "seconds", "tokens", "mb")
"""What a curve can be drawn over. MB are of both directions, a million bytes each."""
MOST_POINTS = 1000
"""Of the curve of a run."""
MOST_CLIENT_POINTS = 24_000
"""Of all curves of clients together, between `LEAST` and `MOST_POINTS` each."""
LEAST = 40
SMOOTH = 40
"""A curve is smoothed over this part of its points."""

Curve = dict[str, list[float | None]]
"""Columns of equal length: the axes, `loss` and `smooth`, in nats per token."""


def add_axes(history: History) -> None:
    """Set on each step and round where it lies on each axis.

    A step's `steps` are its client's so far, its `tokens_so_far` and `mb_so_far` the run's; answers
    that do not count add nothing to these.
    """
    lost = {each["round"]: set(each.get("missing") or ()) for each in history.rounds}
    ended = iter([*history.rounds, None])
    due = next(ended)
    counts: dict[str, int] = defaultdict(int)
    tokens = moved = 0.0
    within = [0.0, 0.0]
    for step in [*history.steps, None]:
        while due is not None and (step is None or step["round"] > due["round"]):
            tokens += due.get("tokens") or 0
            moved += (due.get("bytes_up") or 0) + (due.get("bytes_down") or 0)
            due |= {"steps_so_far": max(counts.values(), default=0), "tokens_so_far": tokens}
            due["mb_so_far"] = moved / 1e6
            within, due = [0.0, 0.0], next(ended)
        if step is None:
            break
        counts[step["client"]] += 1
        if step["client"] not in lost.get(step["round"], ()):
            within[0] += step.get("tokens") or 0
            within[1] += (step.get("bytes_up") or 0) + (step.get("bytes_down") or 0)
        step |= {"steps_so_far": counts[step["client"]], "tokens_so_far": tokens + within[0]}
        step["mb_so_far"] = (moved + within[1]) / 1e6


def train_curve(history: History) -> Curve:
    """Training loss over all clients, by step: the mean by tokens of those whose answers count."""
    lost = {each["round"]: set(each.get("missing") or ()) for each in history.rounds}
    places: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for step in history.steps:
        if step.get("loss") is not None and step["client"] not in lost.get(step["round"], ()):
            places[step["round"], step.get("step", 1)].append(step)
    return _curve([_joined(places[place]) for place in sorted(places)], MOST_POINTS)


def client_curves(history: History) -> dict[str, Curve]:
    """Training loss of each client, by its own steps."""
    own: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for step in history.steps:
        if step.get("loss") is not None:
            own[step["client"]].append(_point(step))
    most = min(MOST_POINTS, max(LEAST, MOST_CLIENT_POINTS // max(1, len(own))))
    return {client: _curve(own[client], most) for client in sorted(own)}


def round_curve(points: Iterable[Mapping[str, Any]], loss: str) -> Curve:
    """A curve of what is known once a round: `loss` names its column."""
    found = [
        {
            "steps": each.get("steps_so_far", 0),
            "rounds": each["round"],
            "seconds": each["at"],
            "tokens": each.get("tokens_so_far", 0),
            "mb": each.get("mb_so_far", 0),
            "loss": each[loss],
        }
        for each in points
        if each.get(loss) is not None
    ]
    return {name: [_short(each[name]) for each in found] for name in (*AXES, "loss")}


def _point(step: Mapping[str, Any]) -> dict[str, float]:
    place = step.get("step", 1)
    share = place / max(1, step.get("steps") or place)
    return {
        "steps": step["steps_so_far"],
        "rounds": step["round"] - 1 + share,
        "seconds": step["at"],
        "tokens": step["tokens_so_far"],
        "mb": step["mb_so_far"],
        "loss": step["loss"],
    }


def _joined(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One point of steps that several clients took side by side."""
    points = [_point(step) for step in steps]
    weights = [step.get("tokens") or 1 for step in steps]
    loss = sum(p["loss"] * w for p, w in zip(points, weights, strict=True)) / sum(weights)
    return {name: max(point[name] for point in points) for name in AXES} | {"loss": loss}


def _curve(points: Sequence[Mapping[str, float]], most: int) -> Curve:
    """Thin points to `most`, each the mean of its neighbours, and smooth what is left."""
    width = -(-len(points) // most) if points else 1
    buckets = [points[start : start + width] for start in range(0, len(points), width)]
    axes = {name: [_short(bucket[-1][name]) for bucket in buckets] for name in AXES}
    losses = [sum(point["loss"] for point in bucket) / len(bucket) for bucket in buckets]
    window = max(1, len(losses) // SMOOTH)
    spans = [losses[max(0, i - window // 2) : i + window // 2 + 1] for i in range(len(losses))]
    smooth = [sum(span) / len(span) for span in spans]
    told: Curve = {
        **axes,
        "loss": [_short(v) for v in losses],
        "smooth": [_short(v) for v in smooth],
    }
    told["each"] = [width]
    return told


def _short(value: float | None) -> float | None:
    """Six digits are more than a screen can show."""
    return None if value is None else float(f"{value:.6g}")
