"""Curves of runs as plotly figures that take their colours from the page, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from simulations.report.numbers import PARTS
from simulations.report.settings import labels

PALETTE = ("#2b8fd0", "#d9622b", "#12996f", "#c4699a", "#c98a00", "#8f74c9", "#8a929b")
"""Told apart by the colour-blind, and on light and dark alike."""
AXES = {
    "rounds": "round",
    "steps": "step of a client",
    "seconds": "seconds",
    "tokens": "tokens trained on",
    "mb": "MB up and down",
}
LOSS = "loss (nats per token)"
MOST_CLIENTS, LONGEST = 8, 36

Run = dict[str, Any]


def losses(runs: Sequence[Run], axis: str) -> go.Figure:
    """Training and held-out loss of runs over an axis."""
    figure = _figure(AXES[axis], LOSS)
    several = len(runs) > 1
    for place, (run, name) in enumerate(zip(runs, called(runs), strict=True)):
        colour = PALETTE[place % len(PALETTE)]
        held, train = run["curves"]["heldout"], run["curves"]["train"]
        before = f"{name}: " if several else ""
        if train["loss"]:
            _line(figure, train[axis], train["smooth"], f"{before}training", colour, faint=True)
        if held["loss"]:
            shade = colour if several else PALETTE[1]
            _line(figure, held[axis], held["loss"], f"{before}held-out", shade, marks=True)
    return figure


def clients(run: Run, axis: str) -> go.Figure:
    """Training loss of each client of a run."""
    figure = _figure(AXES[axis], LOSS)
    for place, (name, curve) in enumerate(list(run["curves"]["clients"].items())[:MOST_CLIENTS]):
        _line(figure, curve[axis], curve["smooth"], name, PALETTE[place % len(PALETTE)])
    return figure


def times(run: Run) -> go.Figure:
    """Where the seconds of each round went."""
    figure = _figure("round", "seconds")
    figure.update_layout(barmode="stack", bargap=0.35)
    rounds = [each for each in run["rounds"] if each["round"] > 0]
    for place, part in enumerate(PARTS):
        values = [each[f"{part}_seconds"] for each in rounds]
        if any(values):
            numbers = [each["round"] for each in rounds]
            figure.add_bar(x=numbers, y=values, name=part, marker_color=PALETTE[place])
    return figure


def called(runs: Sequence[Run]) -> list[str]:
    """Return what to call each run, short enough for a legend."""
    return [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in labels(runs)]


def _line(
    figure: go.Figure,
    x: Sequence[Any],
    y: Sequence[Any],
    name: str,
    colour: str,
    *,
    faint: bool = False,
    marks: bool = False,
) -> None:
    figure.add_scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="lines+markers" if marks or len(y) < 2 else "lines",
        line={"color": colour, "width": 1.5 if faint else 2.5},
        hovertemplate="%{y:.4f}<extra>%{fullData.name}</extra>",
    )


def _figure(x: str, y: str) -> go.Figure:
    """An empty figure; its text and grid are coloured by the page's style sheet."""
    axis = {"zeroline": False, "automargin": True, "gridcolor": "#8884", "linecolor": "#8888"}
    return go.Figure(
        layout={
            "height": 340,
            "autosize": True,
            "margin": {"l": 8, "r": 8, "t": 12, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "hovermode": "x unified",
            "legend": {
                "orientation": "h",
                "yanchor": "bottom",
                "y": 1.02,
                "x": 0,
                "traceorder": "normal",
            },
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}},
            "template": "none",
        }
    )
