"""The study's table and picture, made of what `study.json` holds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulations.study.methods import METHODS, SAME

DIVISIONS = {"iid": "IID", "natural": "by topic"}
"""`data.partitioner`, and what it is called."""

COLOURS = {
    "centralised": "#222222",
    "merged-step": "#e8a33d",
    "merged-round": "#3a8f5c",
    "splitfed-v2": "#8e5bb5",
    "fedavg": "#9cc3e6",
    "splitfed-v1": "#c43c39",
}


def table(result: dict[str, Any]) -> str:
    """Return results, learning rates tried, divisions and equalities as Markdown."""
    pieces = (_results, _search, _divisions, _equalities, _context)
    return "\n".join(line for piece in pieces for line in (*piece(result), ""))


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw held-out loss over tokens, a panel per division, a line per method.

    Parameters
    ----------
    result : dict
        What `study.json` holds.
    path : Path
        The picture, a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (division, title) in zip(panels, DIVISIONS.items(), strict=True):
        for method in METHODS:
            _draw(axes, method, curves_of(result, division, method))
        axes.set_title(f"{title}, {result['study']['clients']} clients")
        axes.set_xlabel("tokens learned from, thousands")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out loss (nats per byte)")
    seeds = len(result["study"]["seeds"])
    note = f"after each round; mean and range of {seeds} seeds" if seeds > 1 else "after each round"
    panels[1].legend(title=note, fontsize=8, title_fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def curves_of(result: dict[str, Any], division: str, method: str) -> list[dict[str, Any]]:
    """The curves of one method and division at the chosen learning rate, by seed."""
    lr = result["rates"][division][method]
    found = [
        curve
        for curve in result["curves"]
        if (curve["division"], curve["method"], curve["lr"]) == (division, method, lr)
    ]
    return sorted(found, key=lambda curve: curve["seed"])


def _draw(axes: Any, method: str, curves: Sequence[dict[str, Any]]) -> None:
    # The loss of random weights says nothing and would flatten all else: rounds from 1.
    tokens = [
        statistics.mean(column) / 1000
        for column in zip(*(c["tokens"][1:] for c in curves), strict=True)
    ]
    columns = list(zip(*(c["losses"][1:] for c in curves), strict=True))
    # Where two methods coincide, a dotted line lies on a broad one.
    style = {"linewidth": 1.6, "linestyle": (0, (1, 1.5))} if method in SAME else {"linewidth": 1.6}
    if method in SAME.values():
        style["linewidth"] = 4.5
        style["alpha"] = 0.45 if method == "centralised" else 1.0
    means = [statistics.mean(column) for column in columns]
    axes.plot(tokens, means, color=COLOURS[method], label=METHODS[method], **style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(tokens, low, high, color=COLOURS[method], alpha=0.12, linewidth=0)


def _results(result: dict[str, Any]) -> list[str]:
    columns = ["method"]
    for title in DIVISIONS.values():
        columns += [f"{title}: held-out loss", f"{title}: more than centralised"]
    lines = [*_head([*columns, "trunk steps"])]
    for method, name in METHODS.items():
        cells = [name]
        for division in DIVISIONS:
            curves = curves_of(result, division, method)
            base = curves_of(result, division, "centralised")
            last = [curve["losses"][-1] for curve in curves]
            gaps = [own - c["losses"][-1] for own, c in zip(last, base, strict=True)]
            cells += [_spread(last, "z.3f"), _spread(gaps, "+z.3f")]
        lines.append(_row([*cells, str(curves[0]["steps"][-1])]))
    return lines


def _search(result: dict[str, Any]) -> list[str]:
    rates = result["study"]["rates"]
    lines = _head(["learning rate", *(f"{lr:g}" for lr in rates)])
    seed = result["study"]["seeds"][0]
    last = {
        (c["division"], c["method"], c["lr"]): c["losses"][-1]
        for c in result["curves"]
        if c["seed"] == seed
    }
    for division, title in DIVISIONS.items():
        for method, name in METHODS.items():
            if method in SAME:
                continue
            chosen = result["rates"][division][method]
            cells = [f"{last[division, method, lr]:.3f}" for lr in rates]
            cells[rates.index(chosen)] = f"**{cells[rates.index(chosen)]}**"
            lines.append(_row([f"{title}, {name}", *cells]))
    return lines


def _equalities(result: dict[str, Any]) -> list[str]:
    lines = _head(["methods that must coincide", "largest difference of held-out loss, any round"])
    for method, other in SAME.items():
        gap = result["differences"][method]
        lines.append(_row([f"{METHODS[method]} and {METHODS[other]}", f"{gap:.1e}"]))
    return lines


def _divisions(result: dict[str, Any]) -> list[str]:
    lines = _head(["division", "smallest and largest client, thousand bytes", "divergence, nats"])
    for division, title in DIVISIONS.items():
        own = result["divisions"][division]
        sizes = f"{min(own['bytes']) / 1000:.0f} and {max(own['bytes']) / 1000:.0f}"
        lines.append(_row([title, sizes, f"{own['divergence']:.3f}"]))
    return lines


def _context(result: dict[str, Any]) -> list[str]:
    study, versions = result["study"], result["versions"]
    minutes = sum(curve["cpu_seconds"] for curve in result["curves"]) / 60
    tokens = statistics.mean(c["tokens"][-1] for c in result["curves"])
    return [
        f"{study['clients']} clients, {study['rounds']} rounds of {study['local_steps']} steps, "
        f"{study['batch_size']} x {study['context']} bytes a client and step, about "
        f"{tokens / 1000:,.0f} thousand tokens; seeds {', '.join(map(str, study['seeds']))}. "
        f"Python {versions['python']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {len(result['curves'])} curves in {minutes:.0f} minutes of "
        f"processor time, {result['seconds'] / 60:.0f} by the clock."
    ]


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range where it shows."""
    mean, low, high = (
        format(value, form) for value in (statistics.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
