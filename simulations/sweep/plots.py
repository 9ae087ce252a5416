"""A sweep's pictures: held-out loss, a line for each setting; and heat maps over two keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulations.sweep.results import MEASURES, last_rows
from simulations.sweep.state import FINISHED, Sweep, shown

if TYPE_CHECKING:
    from pandas import DataFrame

COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
"""Without matplotlib's grey, which those that are not named have."""
NAMED = len(COLOURS)
"""Settings that are named and coloured; of more, those that ended best."""
PANELS = 6
"""Heat maps side by side, for the values of other keys; over more of them means are shown."""


def draw(sweep: Sweep, rows: DataFrame, folder: Path) -> list[Path]:
    """Draw all pictures for which there are points.

    Parameters
    ----------
    sweep : Sweep
        What was swept.
    rows : DataFrame
        As `rows_of` returns them.
    folder : Path
        Where they go.

    Returns
    -------
    list of Path
        The pictures.
    """
    finished = rows[rows["status"] == FINISHED]
    if finished.empty:
        return []
    made = []
    if finished["eval_loss"].notna().any():
        made.append(_draw_lines(sweep, finished, folder / "loss.png"))
    last = last_rows(rows)
    for measure in sweep.plot or ["eval_loss"]:
        known = last[last[measure].notna()]
        # A key of which one value is finished is no axis.
        keys = [key for key in sweep.keys if known[key].nunique(dropna=False) > 1]
        if len(keys) > 1:
            path = folder / f"heat-{measure}.png"
            made.append(_draw_heat(sweep.name, keys, known, measure, path))
    return made


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_lines(sweep: Sweep, rows: DataFrame, path: Path) -> Path:
    """Mean over seeds, and a band from the lowest to the highest."""
    if rows["round"].max() > 1:  # what random weights lose would flatten all else
        rows = rows[rows["round"] > 0]
    curves = {
        _label(sweep.keys, setting): frame.groupby("round").agg(
            tokens=("tokens", "mean"), mean=("eval_loss", "mean"),
            low=("eval_loss", "min"), high=("eval_loss", "max"),
        )
        for setting, frame in _settings(rows, sweep.keys)
    }  # fmt: skip
    order = sorted(curves, key=lambda label: curves[label]["mean"].iloc[-1])
    named = list(curves) if len(curves) <= NAMED else order[:NAMED]
    unit = 1e3 if rows["tokens"].max() >= 1e4 else 1.0
    figure = _figure(9.5, 5)
    axes = figure.subplots()
    for label in (each for each in curves if each not in named):
        axes.plot(curves[label]["tokens"] / unit, curves[label]["mean"], color="#cccccc", lw=0.9)
    for index, label in enumerate(named):
        curve, colour = curves[label], COLOURS[index]
        tokens = curve["tokens"] / unit
        axes.plot(tokens, curve["mean"], color=colour, marker=".", label=label)
        axes.fill_between(tokens, curve["low"], curve["high"], color=colour, alpha=0.15, lw=0)
    axes.set_xlabel(MEASURES["tokens"] + (", thousands" if unit > 1 else ""))
    axes.set_ylabel(MEASURES["eval_loss"])
    axes.grid(alpha=0.25)
    axes.set_title(f"{sweep.name}: after each round; {_seeds(rows)}", fontsize=10)
    title = ", ".join(sweep.keys)
    if len(curves) > len(named):
        title += f"\n(best {len(named)} of {len(curves)}, the others grey)"
    figure.legend(
        *axes.get_legend_handles_labels(),
        title=title, title_fontsize=8, fontsize=8, frameon=False, loc="outside right center",
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    return path


def _settings(rows: DataFrame, keys: Sequence[str]) -> Any:
    """Pairs of a setting's values and its rows."""
    if not keys:
        return [((), rows)]
    return rows.groupby(list(keys), sort=False, dropna=False)


def _label(keys: Sequence[str], setting: Sequence[Any]) -> str:
    return ", ".join(shown(value) for value in setting) if keys else "all"


def _seeds(rows: DataFrame) -> str:
    count = rows["seed"].nunique()
    if count == 1:
        return f"seed {rows['seed'].iloc[0]}"
    return f"mean of {count} seeds, bands from lowest to highest"


def _draw_heat(name: str, keys: Sequence[str], last: DataFrame, measure: str, path: Path) -> Path:
    """The first two keys across and down, a panel for each setting of the others."""
    down, across, *others = keys
    panels = [(_label(others, setting), frame) for setting, frame in _settings(last, others)]
    note = ""
    if len(panels) > PANELS:
        panels, note = [("", last)], f", mean over {', '.join(others)}"
    names = [_ordered(last[key]) for key in (down, across)]
    cells = [_cells(frame, (down, across), names, measure) for _, frame in panels]
    known = [value for cell in cells for row in cell for value in row if not math.isnan(value)]
    width = len(panels) * max(2.2, 0.9 * len(names[1])) + 2.6
    figure = _figure(width, max(2.6, 0.6 * len(names[0]) + 1.6))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for each, (label, _), cell in zip(axes, panels, cells, strict=True):
        image = each.imshow(cell, cmap="viridis_r", vmin=min(known), vmax=max(known), aspect="auto")
        _annotate(each, cell, min(known), max(known))
        each.set_xticks(range(len(names[1])), [shown(name) for name in names[1]])
        each.set_yticks(range(len(names[0])), [shown(name) for name in names[0]])
        each.set_xlabel(across)
        if others and not note:
            each.set_title(f"{', '.join(others)} = {label}", fontsize=9)
    axes[0].set_ylabel(down)
    figure.colorbar(image, ax=list(axes), label=MEASURES[measure])
    seeds = last["seed"].nunique()
    over = f"mean of {seeds} seeds" if seeds > 1 else f"seed {last['seed'].iloc[0]}"
    figure.suptitle(f"{name}: after the last round, {over}{note}", fontsize=10)
    figure.savefig(path, dpi=110)
    return path


def _ordered(values: Any) -> list[Any]:
    """Numbers by size, texts as they first come."""
    unlike = list(dict.fromkeys(values.tolist()))
    numeric = all(isinstance(value, int | float) for value in unlike)
    return sorted(unlike) if numeric else unlike


def _cells(
    frame: DataFrame, keys: Sequence[str], names: Sequence[list[Any]], measure: str
) -> list[list[float]]:
    means = frame.groupby(list(keys), dropna=False)[measure].mean()
    table = dict(zip(means.index.tolist(), means.tolist(), strict=True))
    flat = [float(table.get(pair, math.nan)) for pair in itertools.product(*names)]
    width = len(names[1])
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def _annotate(axes: Any, cells: list[list[float]], low: float, high: float) -> None:
    middle = (low + high) / 2
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            words = "-" if math.isnan(value) else f"{value:.4g}"
            colour = "white" if value > middle and high > low else "black"
            axes.text(column, row, words, ha="center", va="center", color=colour, fontsize=8)
