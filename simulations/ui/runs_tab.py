"""The tab of the runs: which, over what, their curves, and what they came to; new while they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from simulations.ui import curves, told
from simulations.ui.shelf import Shelf

EVERY = 2.0
"""Seconds between two looks at a run that goes."""
DEFAULT_AXIS = "rounds"


def build(shelf: Shelf) -> None:
    """Lay the tab out and wire it; called within the page."""
    seen = gr.State(value="")
    with gr.Row(elem_classes="choose", visible=False) as choose:
        names = gr.Dropdown(
            label="Runs",
            info="One, or several to lay them over each other.",
            multiselect=True,
            choices=[],
            scale=3,
            min_width=320,
            elem_id="runs",
        )
        axis = gr.Radio(
            label="Over",
            choices=[("rounds", "rounds"), ("steps", "steps"), ("time", "seconds"),
                     ("tokens", "tokens"), ("MB", "mb")],
            value=DEFAULT_AXIS,
            scale=2,
            min_width=320,
            elem_id="axis",
        )  # fmt: skip
    summary = gr.HTML(told.nothing(str(shelf.folder)), elem_id="summary")
    with gr.Column(visible=False, elem_id="plots") as plots:
        gr.HTML("<h2>Loss</h2>", elem_classes="section")
        losses = gr.Plot(show_label=False, elem_id="losses")
        with gr.Row() as each:
            with gr.Column(min_width=300):
                gr.HTML("<h2>Training loss by client</h2>", elem_classes="section")
                clients = gr.Plot(show_label=False, elem_id="clients")
            with gr.Column(min_width=300):
                gr.HTML("<h2>Where the time of a round went</h2>", elem_classes="section")
                times = gr.Plot(show_label=False, elem_id="times")
    shown = [seen, names, choose, summary, plots, losses, each, clients, times]
    look = _look(shelf)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.Timer(EVERY).tick(look, [names, axis, seen], shown, **quiet)
    gr.on([names.input, axis.input], look, [names, axis, seen], shown, **quiet)


def _look(shelf: Shelf) -> Callable[..., Any]:
    """What the page asks again and again: everything, or nothing if nothing is new."""

    def look(chosen: list[str] | None, axis: str, seen: str) -> list[Any]:
        known = shelf.names()
        first = not seen
        chosen = [name for name in chosen or () if name in known]
        if first and not chosen:
            chosen = known[:1]
        runs = shelf.runs(chosen)
        stamp = repr((known, chosen, axis, [id(run) for run in runs]))
        if stamp == seen:
            return [gr.skip()] * 9
        picker = gr.Dropdown(choices=known, value=chosen)
        return [stamp, picker, gr.Row(visible=bool(known)), *_views(shelf, known, runs, axis)]

    return look


def _views(shelf: Shelf, known: list[str], runs: list[Any], axis: str) -> list[Any]:
    if not runs:
        words = told.choose() if known else told.nothing(str(shelf.folder))
        return [words, gr.Column(visible=False), None, gr.Row(visible=False), None, None]
    one = runs[0] if len(runs) == 1 else None
    return [
        told.summary(runs),
        gr.Column(visible=True),
        curves.losses(runs, axis),
        gr.Row(visible=one is not None),
        curves.clients(one, axis) if one else None,
        curves.times(one) if one else None,
    ]
