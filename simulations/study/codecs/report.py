"""The table and the picture of the study of codecs, made of the runs that are there.

The gap of a run is what its held-out loss has more than that of the base with the same seed, as a
share of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.sections.link import CROSSINGS
from simulations.study.codecs.settings import BASE, Condition

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns and rows."""

LABELS = {"h1": "h1", "h2": "h2", "grad_h2": "dL/dh2", "grad_h1": "dL/dh1"}
FP32_BITS = 4 * 32
"""Of an element of each of four crossings."""
TARGET = 0.005
"""More held-out loss than this is not what the figure to reach allows."""
SHIFT = 1.04
"""How far a codec's two points stand apart in the picture, so that their ranges can be told."""
COLOURS = ("#c43c39", "#4a90c4", "#3a8f5c", "#8e5bb5", "#e8a33d", "#222222", "#8c6d46", "#d672b0")


def summary(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs come to: by condition's title and codec, over the seeds that have a base.

    Parameters
    ----------
    runs : iterable of mappings
        The lines of `runs.jsonl`.
    """
    found: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}
    for run in runs:
        title = Condition(**run["condition"]).title
        found.setdefault(title, {}).setdefault(run["codec"], {})[run["seed"]] = run
    result = {}
    for title, by_codec in found.items():
        base = by_codec.get(BASE, {})
        rows = {codec: _codec(by_seed, base) for codec, by_seed in by_codec.items()}
        kept = {codec: row for codec, row in rows.items() if row["seeds"]}
        if kept:
            result[title] = {
                "condition": next(iter(base.values()))["condition"],
                "loss_start": _spread([run["loss_start"] for run in base.values()]),
                "loss": _spread([run["loss_without"] for run in base.values()]),
                "heldout_tokens": next(iter(base.values()))["heldout_tokens"],
                "codecs": dict(sorted(kept.items(), key=lambda each: each[1]["factor"])),
            }
    return result


def _codec(
    runs: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """One codec of one condition: means over seeds, and the range of the gaps."""
    seeds = sorted(runs.keys() & base.keys())
    if not seeds:
        return {"seeds": []}
    crossings = {
        name: {
            key: statistics.mean(runs[seed]["crossings"][name][key] or 0.0 for seed in seeds)
            for key in ("bits", "error", "encode_ms_per_mb", "decode_ms_per_mb")
        }
        for name in CROSSINGS
    }
    used = [each for each in crossings.values() if each["bits"]]
    return {
        "seeds": seeds,
        "crossings": crossings,
        "factor": FP32_BITS / sum(each["bits"] for each in used),
        "bytes_per_token": statistics.mean(runs[seed]["bytes_per_token"] for seed in seeds),
        "encode_ms_per_mb": statistics.mean(each["encode_ms_per_mb"] for each in used),
        "decode_ms_per_mb": statistics.mean(each["decode_ms_per_mb"] for each in used),
        **{
            f"gap_{way}": _spread(
                [runs[seed][f"loss_{way}"] / base[seed]["loss_without"] - 1.0 for seed in seeds]
            )
            for way in ("without", "with")
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for each condition: what it weighs, what it loses, what it takes."""
    columns = [
        "codec", "fewer bytes", *(f"bits {LABELS[name]}" for name in CROSSINGS),
        *(f"error {LABELS[name]}" for name in CROSSINGS), "encode, ms/MB", "decode, ms/MB",
        "gap without codec", "gap with codec", "seeds",
    ]  # fmt: skip
    return [
        (
            title,
            columns,
            [_row(name, row, each["condition"]) for name, row in each["codecs"].items()],
        )
        for title, each in result.items()
    ]


def _row(name: str, row: Mapping[str, Any], condition: Mapping[str, Any]) -> list[str]:
    # Of what was kept and named later the error is not known.
    known = [e["bits"] and (e["error"] or not condition["cache_mb"]) for e in _crossings(row)]
    crossings = _crossings(row)
    return [
        name,
        f"{row['factor']:.1f}x",
        *(f"{each['bits']:.2f}" if each["bits"] else "-" for each in crossings),
        *(f"{e['error']:.1%}" if k else "-" for e, k in zip(crossings, known, strict=True)),
        f"{row['encode_ms_per_mb']:.1f}",
        f"{row['decode_ms_per_mb']:.1f}",
        _percent(row["gap_without"]),
        _percent(row["gap_with"]),
        str(len(row["seeds"])),
    ]


def _crossings(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row["crossings"][crossing] for crossing in CROSSINGS]


def _percent(spread: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * spread[key]:+.2f}" for key in ("mean", "low", "high"))
    return f"{mean} %" if low == high else f"{mean} % ({low} to {high})"


def note(title: str, each: Mapping[str, Any]) -> str:
    """What a condition is, in a sentence."""
    own = Condition(**each["condition"])
    before = f"after {own.before} steps in {BASE}, " if own.before else ""
    examples = f"{own.examples} examples, {own.epochs} epochs, " if own.epochs else ""
    examples += f"link.cache_mb={own.cache_mb:g}, " if own.cache_mb else ""
    return (
        f"{title}: {before}{examples}{own.steps} steps of {own.batch_size} x 128 tokens at most, "
        f"learning rate {own.lr:g}; held-out loss over {each['heldout_tokens']:,} tokens "
        f"{each['loss_start']['mean']:.3f} -> {each['loss']['mean']:.3f} in {BASE}. "
        "A gap is what the held-out loss has more than the base's of the same seed; mean and range "
        "over the seeds."
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The tables and notes as Markdown."""
    lines = []
    for title, columns, rows in tables(result):
        lines += [note(title, result[title]), "", _line(columns), _line(["---"] * len(columns))]
        lines += [*(_line(row) for row in rows), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the loss gap against how many times fewer bytes there are, a panel per condition.

    Parameters
    ----------
    result : mapping
        What `summary` returns.
    path : Path
        The picture; its ending says the kind.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not result:
        return
    figure = Figure(figsize=(1.8 + 3.4 * len(result), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(result), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for each in result.values() for name in each["codecs"]))
    colours = dict(zip(names, COLOURS * len(names), strict=False))
    rows = [row for each in result.values() for row in each["codecs"].values()]
    most = max(row["factor"] for row in rows)
    worst = max(row["gap_with"]["high"] for row in rows)
    for axes, (title, each) in zip(panels, result.items(), strict=True):
        _panel(axes, title, each["codecs"], colours, max(most, 8.0))
    gaps = [gap for gap in (-0.5, 0, 0.5, 1, 2, 5, 10, 20, 50) if gap < max(1.1, 200 * worst)]
    panels[0].set_yticks(gaps, [f"{gap:g}" for gap in gaps])
    panels[0].set_ylabel("more held-out loss than fp32, %")
    marks = [
        Line2D([], [], color=colour, marker="o", linewidth=0, label=name)
        for name, colour in colours.items()
        if name != BASE
    ]
    plain: dict[str, Any] = {"color": "#555555", "marker": "o", "linewidth": 0}
    marks += [
        Line2D([], [], label="evaluated in fp32", **plain),
        Line2D([], [], label="through the codec", markerfacecolor="white", **plain),
    ]
    figure.legend(handles=marks, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _panel(
    axes: Any, title: str, codecs: Mapping[str, Any], colours: Mapping[str, str], most: float
) -> None:
    axes.axhline(100 * TARGET, color="#888888", linewidth=0.8, linestyle="--")
    for name, row in codecs.items():
        if name == BASE:
            continue
        colour, x = colours[name], row["factor"]
        ends = [100 * row[f"gap_{way}"]["mean"] for way in ("without", "with")]
        axes.plot([x, x * SHIFT], ends, color=colour, linewidth=0.8, linestyle=":")
        for shift, way, face in ((1.0, "without", colour), (SHIFT, "with", "white")):
            mean, low, high = (100 * row[f"gap_{way}"][key] for key in ("mean", "low", "high"))
            axes.errorbar(
                [x * shift],
                [mean],
                yerr=[[mean - low], [high - mean]],
                color=colour,
                marker="o",
                markersize=6,
                markerfacecolor=face,
                linewidth=1.2,
            )
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1.0)
    ticks = (2, 4, 8, 16, 32, 64)
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.set_xlim(1.7, 1.25 * most)
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("fewer bytes than four fp32 crossings", fontsize=9)
    axes.grid(alpha=0.25)
