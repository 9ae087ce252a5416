"""The table and the picture of the study of privacy: what is read, and what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.audit.observation import EXACT, LEVELS, PUBLIC, STALE, START
from simulations.study.privacy.settings import NOTHING

COLUMNS = {
    ("tokens", EXACT): "tokens: this step's ends",
    ("tokens", STALE): "tokens: the round's first ends",
    ("tokens", START): "tokens: the run's first ends",
    ("tokens", PUBLIC): "tokens: no ends",
    ("labels", EXACT): "labels: this step's ends",
    ("labels", START): "labels: the run's first ends",
}
"""What is read, and whose ends the attacker has; the strongest attack of each counts."""
GOAL = (0.10, 0.01)
"""At most this share of tokens, for at most this much more held-out loss."""
COLOURS = ("#222222", "#4a90c4", "#c43c39", "#8e5bb5", "#3a8f5c", "#e8a33d", "#8c6d46", "#d672b0")


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """By model and point, over the seeds that have an undefended run: loss gap, and the strongest
    attacks.

    Parameters
    ----------
    runs : iterable of mappings
        The lines of `runs.jsonl`.
    """
    found: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for run in runs:
        seeds = found.setdefault(run["model"], {}).setdefault(run["point"], {})
        # A later line has the other attacks of the same training.
        before = seeds.get(run["seed"], {"rows": []})
        seeds[run["seed"]] = {**run, "rows": [*before["rows"], *run["rows"]]}
    return {
        model: {
            name: _point(by_seed, points[NOTHING.name])
            for name, by_seed in points.items()
            if by_seed.keys() & points[NOTHING.name].keys()
        }
        for model, points in found.items()
        if NOTHING.name in points
    }


def _point(
    runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    seeds = sorted(runs.keys() & base.keys())
    first = runs[seeds[0]]
    gaps = [runs[seed]["loss"] / base[seed]["loss"] - 1.0 for seed in seeds]
    return {
        "family": first["family"],
        "strength": first["strength"],
        "seeds": seeds,
        "gap": _spread(gaps),
        **{
            metric: {
                level: _spread_of(runs, seeds, metric, level)
                for what, level in COLUMNS
                if what == metric
            }
            for metric in ("tokens", "labels")
        },
    }


def strongest(rows: Sequence[Mapping[str, Any]], metric: str, level: str) -> float | None:
    """The highest mean of a metric over attacks of a knowledge or of less, which who has it has,
    too; None if none has the metric."""
    has = LEVELS[LEVELS.index(level) :]
    values = [r["mean"] for r in rows if r["metric"] == metric and r["knowledge"] in has]
    return max(values, default=None)


def _spread_of(
    runs: Mapping[int, Mapping[str, Any]], seeds: Sequence[int], metric: str, level: str
) -> dict[str, float] | None:
    values = [strongest(runs[seed]["rows"], metric, level) for seed in seeds]
    known = [value for value in values if value is not None]
    return _spread(known) if known else None


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


def in_words(run: Mapping[str, Any]) -> str:
    """A line of progress."""
    told = {column: strongest(run["rows"], *column) for column in COLUMNS}
    found = ", ".join(
        f"{what} {level} {value:.3f}" for (what, level), value in told.items() if value is not None
    )
    return f"held-out loss {run['loss']:.4f}; {found or '-'}; in {run['seconds']:.0f} s"


def table(points: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one model."""
    columns = ["defence", "more held-out loss", *COLUMNS.values(), "seeds"]
    rows = [
        [
            name,
            _percent(each["gap"], sign="+"),
            *(_percent(each[what][level]) for what, level in COLUMNS),
            str(len(each["seeds"])),
        ]
        for name, each in points.items()
    ]
    return columns, rows


def _percent(spread: Mapping[str, float] | None, sign: str = "") -> str:
    if spread is None:
        return "-"
    mean, low, high = (f"{100 * spread[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} %" if low == high else f"{mean} % ({low} to {high})"


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each model, as Markdown."""
    lines: list[str] = []
    for model, points in result.items():
        columns, rows = table(points)
        lines += [f"{model}:", "", _line(columns), _line(["---"] * len(columns))]
        lines += [*(_line(row) for row in rows), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw tokens recovered against held-out loss, a panel for each model: full marks for who has
    the ends of the step, hollow ones for who has those that the run began with, crosses for who
    has none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not result:
        return
    figure = Figure(figsize=(2.4 + 3.8 * len(result), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(result), squeeze=False, sharey=True)[0]
    families = list(dict.fromkeys(e["family"] for ps in result.values() for e in ps.values()))
    colours = dict(zip(families, COLOURS * len(families), strict=False))
    for axes, (model, points) in zip(panels, result.items(), strict=True):
        _panel(axes, model, points, colours)
    panels[0].set_ylabel("tokens recovered from h1, %")
    marks = [
        Line2D([], [], color=colour, marker="o", linewidth=0, label=family)
        for family, colour in colours.items()
    ]
    plain: dict[str, Any] = {"color": "#555555", "marker": "o", "linewidth": 0}
    marks += [
        Line2D([], [], label="with the step's ends", **plain),
        Line2D([], [], label="with the run's first ends", markerfacecolor="white", **plain),
        Line2D([], [], label="with no ends", **{**plain, "marker": "x"}),
    ]
    figure.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _most(points: Mapping[str, Any]) -> float:
    """The largest loss gap, per cent; 1 at least."""
    return max(1.0, *(100 * each["gap"]["mean"] for each in points.values()))


def _panel(axes: Any, model: str, points: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    tokens, loss = GOAL
    axes.fill_between([-1.0, 100 * loss], 0, 100 * tokens, color="#3a8f5c", alpha=0.15, linewidth=0)
    axes.axvline(100 * loss, color="#888888", linewidth=0.8, linestyle="--")
    axes.axhline(100 * tokens, color="#888888", linewidth=0.8, linestyle="--")
    for level, mark, face in ((EXACT, "o", None), (START, "o", "white"), (PUBLIC, "x", None)):
        for family, colour in colours.items():
            at = [
                (100 * each["gap"]["mean"], 100 * each["tokens"][level]["mean"])
                for each in points.values()
                if each["family"] == family and each["tokens"][level]
            ]
            if at:
                x, y = zip(*sorted(at), strict=True)
                axes.plot(
                    x, y, color=colour, marker=mark, linewidth=0.8, linestyle=":",
                    markerfacecolor=face or colour,
                )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1.0)
    ticks = [gap for gap in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if gap <= _most(points) * 1.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=-0.15)
    axes.set_ylim(-3, 103)
    axes.set_title(model, fontsize=10)
    axes.set_xlabel("more held-out loss than undefended, %", fontsize=9)
    axes.grid(alpha=0.25)
