"""The loss plot of a run, drawn from its history."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from flower_app.runs.history import History

NAMED_CLIENTS = 8
"""Clients that get a legend entry of their own."""


def plot_loss(history: History) -> Path:
    """Draw training loss per step and client, and held-out loss per round, as `loss.png`.

    Returns
    -------
    Path
        The picture, in the run folder.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, evaluated = _curves(history)
    folder = history.folder
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (client, losses) in enumerate(sorted(train.items())):
        _draw_client(axes, index, client, losses)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="black", label="held-out, all clients")
    axes.set_xlabel("optimizer steps of a client")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(folder.name, fontsize=10)
    axes.grid(alpha=0.25)
    if train or evaluated:
        axes.legend(title=_smoothing(train), fontsize=8, title_fontsize=8, frameon=False)
    figure.savefig(folder / "loss.png", dpi=150)
    return folder / "loss.png"


def _curves(history: History) -> tuple[dict[str, list[float]], list[tuple[int, float]]]:
    """Return training losses by client, and held-out losses as (steps so far, loss)."""
    train: dict[str, list[float]] = defaultdict(list)
    evaluated: list[tuple[int, float]] = []
    steps = iter([*history.steps, None])
    step = next(steps)
    for record in history.rounds:
        while step is not None and step["round"] <= record["round"]:
            _add(train, step)
            step = next(steps)
        loss = (record.get("evaluate") or {}).get("loss")
        if loss is not None:
            evaluated.append((max(map(len, train.values()), default=0), loss))
    while step is not None:  # of a round that is not over
        _add(train, step)
        step = next(steps)
    return train, evaluated


def _add(train: dict[str, list[float]], step: dict[str, Any]) -> None:
    train[step["client"]].append(float("nan") if step["loss"] is None else step["loss"])


def _draw_client(axes: Any, index: int, client: str, losses: list[float]) -> None:
    steps = range(1, len(losses) + 1)
    label = f"training, {client}" if index < NAMED_CLIENTS else None
    window = _window(losses)
    if window == 1:
        axes.plot(steps, losses, color=f"C{index % 10}", linewidth=1.2, label=label)
        return
    axes.plot(steps, losses, color=f"C{index % 10}", linewidth=0.6, alpha=0.3)
    axes.plot(steps, _smooth(losses, window), color=f"C{index % 10}", linewidth=1.4, label=label)


def _window(losses: list[float]) -> int:
    """Return over how many steps a client's loss is smoothed."""
    return max(1, len(losses) // 40)


def _smoothing(train: dict[str, list[float]]) -> str | None:
    """Return what the bold and the faint lines are, if there are faint ones."""
    windows = sorted({_window(losses) for losses in train.values()} - {1})
    if not windows:
        return None
    span = "-".join(dict.fromkeys((str(windows[0]), str(windows[-1]))))
    return f"smoothed over {span} steps; raw values faint"


def _smooth(losses: list[float], window: int) -> list[float]:
    """Return the mean of each loss and the `window - 1` before it."""
    spans = (losses[max(0, end - window) : end] for end in range(1, len(losses) + 1))
    return [sum(span) / len(span) for span in spans]
