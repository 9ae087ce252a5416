"""The comparison's tables and figure, made of what `bench_compare` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.bench.compare.settings import CENTRAL, FEDAVG, NAMES

COLOURS = {
    CENTRAL: "#222222",
    FEDAVG: "#4a90c4",
    "splitfed-v1": "#c43c39",
    "splitfed-v2": "#8e5bb5",
    "merged": "#e8a33d",
    "messages": "#3a8f5c",
}
LINES = ("-", "--", ":")

_ROWS: tuple[tuple[str, str, str, float], ...] = (
    ("seconds of a step, median", "step_seconds", ".3f", 1),
    ("tokens a second", "tokens_per_second", ",.0f", 1),
    ("seconds of a round", "round_seconds", ".2f", 1),
    ("- computing, client", "client_seconds", ".2f", 1),
    ("- computing, server", "server_seconds", ".2f", 1),
    ("- network and waiting", "network_seconds", ".2f", 1),
    ("- averaging", "averaging_seconds", ".3f", 1),
    ("- Flower and the rest", "rest_seconds", ".2f", 1),
    ("seconds to start and stop", "start_seconds", ".0f", 1),
    ("seconds to the target loss", "target_seconds", ".1f", 1),
    ("held-out loss, final", "heldout_loss", ".5f", 1),
    ("client's memory, MiB", "client_memory_mb", ".0f", 1),
    ("client's MFLOP a token", "client_flops_per_token", ".2f", 1e-6),
    ("server's MFLOP a token", "server_flops_per_token", ".2f", 1e-6),
    ("stream: bytes up a token", "bytes_up_per_token", ",.0f", 1),
    ("stream: bytes down a token", "bytes_down_per_token", ",.0f", 1),
    ("Flower: kB up a round", "flower_up_per_round", ",.0f", 1e-3),
    ("Flower: kB down a round", "flower_down_per_round", ",.0f", 1e-3),
)
"""Title, key, format and unit of each row."""

_WEAK = (
    "Mbit/s", "k", "unsplit, s a step", "predicted / measured", "split, s a step",
    "predicted / measured", "unsplit with messages", "split with messages", "quicker",
    "client's memory, MiB: unsplit, split", "clients that fill the trunk",
)  # fmt: skip


def tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Columns and rows of the comparison, of what must coincide, and of weak clients."""
    methods = result["methods"]
    compared = [
        [title, *(_cell(row[key], form, unit) for row in methods.values())]
        for title, key, form, unit in _ROWS
    ]
    gaps = [[name, f"{gap:+.1e}"] for name, gap in result["differences"].items()]
    weak = [_weak_row(row, result["memory"]) for row in result["weak"]]
    return [
        (["", *(NAMES[method] for method in methods)], compared),
        (["methods that must coincide", "difference of final held-out loss"], gaps),
        (list(_WEAK), weak),
    ]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What was run on what, and what came out, in sentences."""
    own, machine, head = result["setting"], result["machine"], result["headline"]
    even = ", ".join(
        f"{'never' if k is None else f'{k:.1f}'} at {megabits} Mbit/s"
        for megabits, k in head["break_even"].items()
    )
    return [
        f"{own['clients']} clients, {own['rounds']} rounds of {own['local_steps']} steps of "
        f"{own['batch_size']} x {own['context']} bytes a client; LoRA of rank {own['rank']} on a "
        f"Llama of {own['blocks']} x {own['hidden']}, cut {own['cut'][0]},{own['cut'][1]}; fp32 on "
        f"the wire; one torch thread a process; {machine['cpus']} CPUs, Python "
        f"{machine['python']}, torch {machine['torch']}. Target loss {result['target_loss']:.3f}. "
        f"In all {result['seconds']:.0f} s.",
        f"A split step took {head['step_ratio']:.2f} unsplit steps, tokens a second were "
        f"{head['throughput_ratio']:.2f} times FedAvg's. A client does {head['flops_share']:.0%} "
        f"of the operations and holds {head['memory_share']:.0%} of the memory; "
        f"{head['bytes_per_token']:,.0f} bytes a token cross the line.",
        f"By the formula, whose errors the last table shows, a split step becomes the quicker one "
        f"for clients that compute k times slower: {even}.",
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The tables and notes as Markdown."""
    blocks = [*("\n".join(_markdown(*each)) for each in tables(result)), *notes(result)]
    return "\n\n".join(blocks) + "\n"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw held-out loss over seconds, and a step's seconds over k, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_losses(left, result)
    _draw_weak(right, result)
    figure.savefig(path, dpi=110)


def _draw_losses(axes: Any, result: Mapping[str, Any]) -> None:
    for method, row in result["methods"].items():
        seconds, losses = zip(*row["curve"], strict=True)
        axes.plot(
            seconds, losses, color=COLOURS[method], label=NAMES[method], marker="o", markersize=3.5
        )
    axes.axhline(result["target_loss"], color="#999999", linewidth=0.8, linestyle=":")
    axes.set_title("Held-out loss, after each round")
    axes.set_xlabel("seconds of training (without starting Flower)")
    axes.set_ylabel("nats per byte")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)


def _draw_weak(axes: Any, result: Mapping[str, Any]) -> None:
    rows = result["weak"]
    widths = list(dict.fromkeys(row["megabits"] for row in rows))
    first = [row for row in rows if row["megabits"] == widths[0]]
    _line(axes, first, "unsplit", COLOURS[FEDAVG], "-", "unsplit")
    for megabits, style in zip(widths, LINES, strict=False):
        own = [row for row in rows if row["megabits"] == megabits]
        _line(axes, own, "split", COLOURS["splitfed-v1"], style, f"split, {megabits} Mbit/s")
    slow = [row["slow"] for row in first]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(slow, [str(k) for k in slow])
    axes.set_title("A step of weak clients: measured (dots), predicted (lines)")
    axes.set_xlabel("k: how many times slower a client computes")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25, which="both")


def _line(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, colour: str, style: str, label: str
) -> None:
    slow = [row["slow"] for row in rows]
    axes.plot(slow, [row[f"{key}_predicted"] for row in rows], color=colour, linestyle=style,
              label=label)  # fmt: skip
    axes.plot(slow, [row[key] for row in rows], "o", color=colour, markersize=5)


def _weak_row(row: Mapping[str, Any], memory: Mapping[str, Any]) -> list[str]:
    ahead = row["split_with_messages"] < row["unsplit_with_messages"]
    return [
        str(row["megabits"]),
        str(row["slow"]),
        f"{row['unsplit']:.3f}",
        f"{row['unsplit_predicted'] / row['unsplit']:.2f}",
        f"{row['split']:.3f}",
        f"{row['split_predicted'] / row['split']:.2f}",
        f"{row['unsplit_with_messages']:.3f}",
        f"{row['split_with_messages']:.3f}",
        "split" if ahead else "unsplit",
        f"{memory['whole']['peak_mb']:.0f}, {memory['ends']['peak_mb']:.0f}",
        str(row["most_clients"]),
    ]


def _cell(value: float | None, form: str, unit: float) -> str:
    return "-" if value is None or value == 0 else format(value * unit, form)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
