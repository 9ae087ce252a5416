"""The table and the pictures of `graft bench wire`, made of its result."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

PARTS = {
    "bottom": ("#9cc3e6", "bottom, client"),
    "top": ("#4a7fb5", "top, client"),
    "trunk": ("#3a8f5c", "trunk, waited for"),
    "network": ("#c43c39", "network, frames, codec"),
}
DASHES = ("-", "--", ":", "-.")
"""A codec each."""
MOST_BARS = 40
"""Of a picture that is still read."""


def columns(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows for the terminal."""
    names = ["network", "codec", "micro", "window", "unsplit s", "split s", "ratio"]
    names += ["bottom", "top", "trunk", "network s", "MB up", "MB down"]
    rows = []
    for row in result["rows"]:
        parts = (f"{row[f'{part}_seconds']:.3f}" for part in PARTS)
        sizes = (f"{row[way] / 1e6:.2f}" for way in ("bytes_up", "bytes_down"))
        times = (f"{row['unsplit_seconds']:.3f}", f"{row['split_seconds']:.3f}")
        what = (row["network"], row["codec"], row["micros"], row["window"])
        rows.append([*what, *times, f"{row['ratio']:.2f}", *parts, *sizes])
    return names, rows


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw where the time goes, and the ratio over the round trip if there are several.

    Parameters
    ----------
    result : dict
        As `bench_wire` returns it.
    folder : Path
        Takes `wire.png` and `wire-rtt.png`.

    Returns
    -------
    list of Path
        The pictures.
    """
    rows, made = result["rows"], []
    if len(rows) <= MOST_BARS:
        made.append(_draw_bars(rows, folder / "wire.png"))
    if len({row["rtt"] for row in rows if row["bandwidth"]}) > 1:
        made.append(_draw_lines(rows, folder / "wire-rtt.png"))
    return made


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_bars(rows: list[dict[str, Any]], path: Path) -> Path:
    """A bar for each point, as long as its step in unsplit steps, in the parts of its time."""
    figure = _figure(9.5, 1.5 + 0.36 * len(rows))
    axes = figure.subplots()
    places = range(len(rows))
    before = [0.0] * len(rows)
    for part, (colour, label) in PARTS.items():
        width = [row["ratio"] * _shown(row, part) / row["split_seconds"] for row in rows]
        axes.barh(places, width, left=before, color=colour, label=label, height=0.72)
        before = [start + own for start, own in zip(before, width, strict=True)]
    for place, row in zip(places, rows, strict=True):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        spot = (row["ratio"], place)
        axes.annotate(
            f"{row['ratio']:.2f}",
            spot,
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox=box,
        )
    axes.axvline(1.0, color="#222222", linewidth=1.2, linestyle=(0, (3, 2)), zorder=2)
    axes.set_yticks(places, [f"{row['network']}: {_way(row)}" for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(max(row["ratio"] for row in rows), 1.0))
    axes.set_xlabel("seconds of a split step, in unsplit steps (dashed)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _shown(row: dict[str, Any], part: str) -> float:
    """Seconds of a part; of the trunk's those that the client waited for, at most."""
    seconds: float = row[f"{part}_seconds"]
    return min(seconds, row["waiting_seconds"]) if part == "trunk" else seconds


def _draw_lines(rows: list[dict[str, Any]], path: Path) -> Path:
    """The ratio over the round trip: a panel for each bandwidth, a line for each way to split."""
    bandwidths = sorted({row["bandwidth"] for row in rows if row["bandwidth"]})
    figure = _figure(1.2 + 3.6 * len(bandwidths), 4.4)
    panels = figure.subplots(1, len(bandwidths), sharey=True, squeeze=False)[0]
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    orders = sorted({(row["micros"], row["window"]) for row in rows})
    for axes, bandwidth in zip(panels, bandwidths, strict=True):
        for (number, order), (dash, codec) in itertools.product(
            enumerate(orders), zip(itertools.cycle(DASHES), codecs)
        ):
            mine = [row for row in rows if row["bandwidth"] == bandwidth]
            mine = [row for row in mine if (row["codec"], _order(row)) == (codec, order)]
            x, y = [1000 * row["rtt"] for row in mine], [row["ratio"] for row in mine]
            look = {"color": f"C{number % 10}", "linestyle": dash, "marker": "o", "markersize": 3.5}
            axes.plot(x, y, label=_way(mine[0]) if mine else "", **look)
        axes.axhline(1.0, color="#222222", linewidth=1.2, linestyle=(0, (3, 2)))
        axes.set_title(f"{bandwidth / 1e6:g} Mbit/s each way")
        axes.set_xlabel("round trip, ms")
        axes.grid(alpha=0.25)
    panels[0].set_yscale("log")
    ticks = [tick for tick in (0.7, 0.8, 1, 1.2, 1.5, 2, 3, 5, 10, 20) if tick <= 1.2 * _most(rows)]
    panels[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].minorticks_off()
    panels[0].set_ylabel("split step / unsplit step")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    return path


def _most(rows: list[dict[str, Any]]) -> float:
    return max(row["ratio"] for row in rows)


def _order(row: dict[str, Any]) -> tuple[int, int]:
    return row["micros"], row["window"]


def _way(row: dict[str, Any]) -> str:
    micros = "1 micro-batch" if row["micros"] == 1 else f"{row['micros']} micro-batches"
    window = f", window {row['window']}" if row["window"] > 1 else ""
    return f"{row['codec']}, {micros}{window}"
