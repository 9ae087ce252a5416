"""A run at one instant as a frame of the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from flower_app.runs.folders import FAILED, FINISHED, STOPPED
from flower_app.runs.history import RUNNING, UNFINISHED
from simulations.watch.clients import (
    ANSWERED,
    ASKED,
    EVALUATING,
    IDLE,
    MISSING,
    PHASES,
    TRAINING,
    Client,
)
from simulations.watch.spark import bar, duration, megabytes, size, spark
from simulations.watch.state import State

NARROW, WIDE, WIDEST = 72, 110, 130
"""Columns from which a client's speed and bytes, its time, and its bytes each way are shown too."""
PARTS = {"bottom": "bottom", "network": "net", "trunk": "trunk", "top": "top"}
"""Of a step's time, and what their columns are called."""
NOTES = 4
"""Notes that are shown, the last ones."""
FIXED = 14
"""Lines of a frame besides clients and notes."""
COLOURS = {
    RUNNING: "green", FINISHED: "green", STOPPED: "yellow", UNFINISHED: "yellow", FAILED: "red",
    MISSING: "red", TRAINING: "green", EVALUATING: "cyan", ASKED: "yellow", ANSWERED: "blue",
    IDLE: "dim",
}  # fmt: skip


class Frame:
    """What `graft watch` shows; fits itself to the terminal, whose height it does not exceed.

    Parameters
    ----------
    state : State
        The run.
    whole : bool
        Show all clients, however many lines that takes.
    """

    def __init__(self, state: State, *, whole: bool = False) -> None:
        self._state, self._whole = state, whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the frame's parts from top to bottom."""
        state, width = self._state, options.max_width
        height = options.height or console.height
        notes = _notes(state)
        room = max(3, height - FIXED - len(notes))
        yield from _head(state, width)
        yield Text()
        yield from _losses(state, width)
        yield Text()
        yield from _clients(state, width, len(state.clients) if self._whole else room)
        yield Text()
        yield from _totals(state, width)
        yield from notes


def _head(state: State, width: int) -> Iterator[RenderableType]:
    history, config = state.history, state.history.config
    status = Text(history.status, style=f"bold {COLOURS.get(history.status, 'white')}")
    yield _apart(Text(history.folder.name, style="bold"), status)
    strategy = (config.get("train") or {}).get("strategy", "")
    facts = [str(config.get("experiment", "")), str(strategy), history.model]
    left = Text(" · ".join(fact for fact in facts if fact), style="dim")
    count = len(state.clients)
    yield _apart(left, Text(f"{count} client{'' if count == 1 else 's'}", style="dim"))
    share = _share(state)
    time = f"{duration(state.elapsed)} elapsed"
    if history.status == RUNNING:
        time += f", about {duration(state.left)} left" if state.left is not None else ""
    told = f"round {state.number}/{state.rounds}  {_at(state)}"
    room = max(10, width - len(told) - len(time) - 12)
    line = Text(f"{told}  ", no_wrap=True, overflow="ellipsis")
    line.append(bar(share, room), style="green")
    line.append(f" {share:4.0%}  {time}")
    yield line


def _share(state: State) -> float:
    if state.history.status == FINISHED:
        return 1.0
    under_way = state.done if state.number > state.over else 0.0
    return min(1.0, (state.over + under_way) / state.rounds)


def _at(state: State) -> str:
    """What the run is at, in a word."""
    if state.history.status == UNFINISHED:
        return "nobody writes it"
    if state.history.status != RUNNING:
        return ""
    if state.current is None:
        return "between rounds" if state.history.rounds else "starting"
    if state.current["training"]:
        return "training"
    return "evaluating" if state.number else "evaluating before training"


def _losses(state: State, width: int) -> Iterator[RenderableType]:
    trained = step_losses(state.history.steps)
    rounds = state.history.rounds
    of = "central" if any(record.get("central") for record in rounds) else "evaluate"
    evaluated = [
        (record["round"], record[of]["loss"])
        for record in rounds
        if (record.get(of) or {}).get("loss") is not None
    ]
    room = max(10, width - 40)
    tenth = max(1, len(trained) // 20)
    first, last = trained[:tenth], trained[-tenth:]
    ends = (sum(first) / tenth, sum(last) / tenth) if trained else None
    yield _curve("train loss", trained, ends, room, f"{len(state.history.steps)} steps")
    held = [loss for _, loss in evaluated]
    best = min(evaluated, key=lambda told: told[1], default=None)
    words = f"best {best[1]:.4f} in round {best[0]}" if best else "nobody has evaluated yet"
    name = "central loss" if of == "central" else "held-out loss"
    yield _curve(name, held, (held[0], held[-1]) if held else None, room, words)


def step_losses(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the mean over clients of each step, weighted by tokens.

    Clients differ, and may take turns: one after another they would be no curve.
    """
    sums: dict[tuple[int, int], tuple[float, int]] = {}
    for step in steps:
        if step["loss"] is not None:
            place = step["round"], step["step"]
            loss, tokens = sums.get(place, (0.0, 0))
            sums[place] = loss + step["loss"] * step["tokens"], tokens + step["tokens"]
    return [loss / tokens for _, (loss, tokens) in sorted(sums.items()) if tokens]


def _curve(
    name: str, values: list[float], ends: tuple[float, float] | None, room: int, words: str
) -> Text:
    line = Text(f"{name:<14}", style="bold")
    if ends is not None:
        line.append(f"{ends[0]:.4f} ", style="default")
        line.append(spark(values, min(room, 60)), style="cyan")
        line.append(f" {ends[1]:.4f}", style="bold")
    line.append(f"  {words}", style="dim")
    line.truncate(room + 40)
    return line


def _clients(state: State, width: int, room: int) -> Iterator[RenderableType]:
    if not state.clients:
        yield Text("no client was asked yet", style="dim")
        return
    shown, hidden = choose(state.clients, room)
    held_out = width >= WIDE and any(client.held_out is not None for client in shown)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    table.add_column("client", no_wrap=True, max_width=18)
    table.add_column("is", no_wrap=True, ratio=1, overflow="ellipsis")
    for name in ("seen", "loss", *(("tokens/s",) if width >= NARROW else ())):
        table.add_column(name, justify="right", no_wrap=True)
    if held_out:
        table.add_column("held-out", justify="right", no_wrap=True)
    traffic = ("up", "down") if width >= WIDEST else ("up+down",)
    for name in traffic if width >= NARROW else ():
        table.add_column(name, justify="right", no_wrap=True)
    for name in PARTS.values() if width >= WIDE else ():
        table.add_column(name, justify="right", no_wrap=True)
    for client in shown:
        table.add_row(*_row(client, state, width, held_out))
    yield table
    if hidden:
        counts = Counter(client.phase for client in hidden)
        told = ", ".join(f"{counts[phase]} {phase}" for phase in PHASES if counts[phase])
        yield Text(f"and {len(hidden)} more: {told}", style="dim")


def choose(clients: list[Client], room: int) -> tuple[list[Client], list[Client]]:
    """Return those that a frame shows, in their order, and the others.

    Who is missing comes first, then whoever is at work and was not heard of for longest.
    """
    if len(clients) <= room:
        return clients, []
    by_need = sorted(clients, key=lambda c: (PHASES.index(c.phase), c.last or 0.0))
    first = {client.name for client in by_need[: room - 1]}
    shown = [client for client in clients if client.name in first]
    return shown, [client for client in clients if client.name not in first]


def _row(client: Client, state: State, width: int, held_out: bool) -> list[Text]:
    silent = None if client.last is None else state.elapsed - client.last
    phase = client.phase
    if phase == TRAINING:
        phase = f"training {client.step}/{client.steps}"
    elif phase == MISSING:
        phase = f"missing: {client.why}"
    cells = [
        Text(client.name),
        Text(phase, style=COLOURS[client.phase]),
        Text("-" if silent is None else f"{duration(silent)} ago"),
        Text(_number(client.loss)),
    ]
    if width >= NARROW:
        cells.append(Text("-" if client.speed is None else f"{client.speed:,.0f}"))
    if held_out:
        cells.append(Text(_number(client.held_out)))
    if width >= WIDEST:
        cells += [Text(size(client.bytes_up)), Text(size(client.bytes_down))]
    elif width >= NARROW:
        cells.append(Text(size(client.bytes_up + client.bytes_down)))
    if width >= WIDE:
        shares = client.shares
        cells += [Text(f"{shares[part]:.0%}" if part in shares else "-") for part in PARTS]
    return cells


def _totals(state: State, width: int) -> Iterator[RenderableType]:
    speed = "-" if state.speed is None else f"{state.speed:,.0f}"
    told = [
        f"{speed} tokens/s",
        f"{size(state.bytes_up)} up, {size(state.bytes_down)} down",
        f"server {megabytes(state.server_mb)}"
        + (f", peak {megabytes(state.peak_mb)}" if state.peak_mb else ""),
    ]
    yield Text("   ".join(told), no_wrap=True, overflow="ellipsis")
    if width < WIDE and (shares := _mean_shares(state.clients)):
        parts = ", ".join(f"{part} {share:.0%}" for part, share in shares.items())
        yield Text(f"a step's time: {parts}", style="dim")


def _mean_shares(clients: list[Client]) -> dict[str, float]:
    """Of those whose shares are known."""
    known = [shares for client in clients if (shares := client.shares)]
    return (
        {part: sum(shares[part] for shares in known) / len(known) for part in known[0]}
        if known
        else {}
    )


def _notes(state: State) -> list[Text]:
    history, told = state.history, list(state.notes)
    if history.status == UNFINISHED:
        told.append(
            f"killed, or its machine went down; to go on: graft resume {history.folder.name}"
        )
    if state.silent >= 60:
        told.append(f"nothing was recorded for {duration(state.silent)}")
    shown = [
        Text(f"! {text}", style="yellow", no_wrap=True, overflow="ellipsis")
        for text in told[-NOTES:]
    ]
    if error := (history.summary or {}).get("error"):
        shown.append(Text(f"failed: {error}", style="red"))
    return shown


def _apart(left: Text, right: Text) -> Table:
    """One line, with a part at each end."""
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    line.add_row(left, right)
    return line


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
