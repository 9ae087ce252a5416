"""A plan on the terminal: tables, and in words what they rest on."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from simulations.plan.units import in_bytes, in_short, in_time

FEDAVG = "no cut"

LEAST_TOGETHER = 0.001
"""Of a step: a smaller share is not told."""
ALIKE = 0.05
"""Share of a round's seconds that is not worth a word."""


def show(plan: dict[str, Any], console: Console | None = None) -> None:
    """Print a plan.

    Parameters
    ----------
    plan : dict
        What `make_plan` returns.
    console : Console, optional
        Where to; by default the terminal.
    """
    console = console or Console(highlight=False)
    console.print(_title(plan))
    for table in (_parts(plan), _memory(plan), _step(plan), _cuts(plan)):
        console.print()
        console.print(table)
    console.print()
    for line in [*verdicts(plan), *assumptions(plan)]:
        console.print(f"- {line}", soft_wrap=False)


def verdicts(plan: dict[str, Any]) -> list[str]:
    """What follows from the numbers: the best cut, and whether to split at all."""
    found = [_best(plan), _against_fedavg(plan)]
    wire = plan["wire"]
    if wire["largest_frame"] > plan["setting"]["max_frame"]:
        found.append(
            f"the largest frame has {in_bytes(wire['largest_frame'])}, more than "
            f"link.max_frame_mb allows ({in_bytes(plan['setting']['max_frame'])}): raise it, or "
            "lower the batch"
        )
    return found


def assumptions(plan: dict[str, Any]) -> list[str]:
    """What the numbers rest on."""
    setting = plan["setting"]
    found = [
        "memory is what torch holds for tensors; Python and its libraries take some 0.5 GB more in "
        "each process, and frames under way a few times the largest one "
        f"({in_bytes(plan['wire']['largest_frame'])})",
        "no example is padded, every batch is full, and each client has the bandwidth to itself",
        "other clients' sessions are at their peak at the same time",
        f"a round is {setting['steps']} steps of each client, and the ends both ways; evaluation, "
        "Flower's messages and start-up come on top",
    ]
    if plan["model"]["transport"] != "stream":
        found.append(
            f"frames go over a stream: what link.transport={plan['model']['transport']} adds to a "
            "step is not planned"
        )
    return found + [_speed(who, setting) for who in ("client", "server")]


def _title(plan: dict[str, Any]) -> str:
    model, setting = plan["model"], plan["setting"]
    tuning = model["tuning"]
    modes = set(tuning.values())
    tuned = modes.pop() if len(modes) == 1 else ", ".join(f"{k} {v}" for k, v in tuning.items())
    if "lora" in tuned:
        tuned += f" (rank {model['rank']})"
    rows, tokens = model["batch"]
    again = f" x {model['accumulate']} micro-batches" if model["accumulate"] > 1 else ""
    return (
        f"[bold]{model['name']}[/bold]: {model['family']}, {model['blocks']} blocks x "
        f"{model['width']:,}, vocabulary {model['vocabulary']:,}\n"
        f"cut [bold]{model['cut']}[/bold], {tuned}, {model['optimizer']}; weights "
        f"{model['dtype']}, compute {model['precision']}, wire {model['wire']}\n"
        f"{rows} x {tokens} tokens{again} a step; {model['strategy']}, {setting['clients']} "
        f"client{'s' if setting['clients'] > 1 else ''} at once; "
        f"{in_short(setting['bandwidth'])}bit/s each way, round trip {in_time(setting['latency'])}"
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.title_style = "bold"
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _parts(plan: dict[str, Any]) -> Table:
    table = _table("Parts", "", "blocks", "parameters", "trained")
    for role, part in plan["parts"].items():
        numbers = (in_short(part["parameters"]), in_short(part["trainable"]))
        table.add_row(role, str(part["blocks"]), *numbers)
    whole = plan["unsplit"]
    numbers = (in_short(whole["parameters"]), in_short(whole["trainable"]))
    table.add_row(FEDAVG, str(plan["model"]["blocks"]), *numbers)
    return table


def _memory(plan: dict[str, Any]) -> Table:
    keys = ("weights", "gradients", "optimizer", "activations", "peak")
    table = _table("Memory of a step", "", *keys)
    for who, name in (("client", "client"), ("server", "server, a session")):
        table.add_row(name, *(in_bytes(plan[who][key]) for key in keys))
    sessions = plan["server"]["sessions"]
    if sessions > 1:
        table.add_row(f"server, {sessions} sessions", *[""] * 4, in_bytes(plan["server"]["all"]))
    table.add_row(f"{FEDAVG}: client", *(in_bytes(plan["unsplit"][key]) for key in keys))
    return table


def _step(plan: dict[str, Any]) -> Table:
    seconds, wire, flops = plan["seconds"], plan["wire"], plan["flops"]
    table = _table("Seconds of a step", "", "", "")
    table.show_header = False
    rows: list[tuple[str, float, str]] = [
        ("client computes", seconds["client"], f"{in_short(flops['client'])}FLOP"),
        ("server computes", seconds["server"], f"{in_short(flops['server'])}FLOP"),
        (
            "bytes on the wire",
            seconds["wire"],
            f"{in_bytes(wire['up'])} up, {in_bytes(wire['down'])} down, "
            f"{wire['per_token']:,.0f} B a token",
        ),
        ("round trips", seconds["latency"], str(wire["round_trips"])),
        ("packing", seconds["framing"], "tensors to frames and back, measured here"),
        ("waiting", seconds["waiting"], "while the trunk serves other clients"),
        ("a step", seconds["total"], ""),
        (
            "a round",
            seconds["round"],
            f"{plan['setting']['steps']} steps; {in_bytes(wire['round_up'])} up, "
            f"{in_bytes(wire['round_down'])} down, ends {in_bytes(wire['ends'])} each way",
        ),
        (f"{FEDAVG}: a step", plan["unsplit"]["step"], f"{in_short(flops['unsplit'])}FLOP"),
        (
            f"{FEDAVG}: a round",
            plan["unsplit"]["round"],
            f"weights {in_bytes(plan['unsplit']['state'])} each way",
        ),
    ]
    if seconds["together"] > LEAST_TOGETHER * seconds["total"]:
        rows.insert(5, ("together", seconds["together"], "less: it happens at the same time"))
    for name, value, note in rows:
        style = "bold" if name in ("a step", "a round") else ""
        table.add_row(name, in_time(value), note, style=style)
    table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    return table


def _cuts(plan: dict[str, Any]) -> Table:
    table = _table(
        "Other cuts", "cut", "client holds", "server holds", "client", "server", "a step", "fits"
    )
    for row in plan["alternatives"]:
        marks = [
            name
            for name, cut in (("asked", plan["model"]["cut"]), ("best", plan["best"]))
            if row["cut"] == cut
        ]
        table.add_row(
            " ".join([row["cut"], *marks]),
            in_bytes(row["client_peak"]),
            in_bytes(row["server_peak"]),
            *(in_time(row[key]) for key in ("client_seconds", "server_seconds", "step")),
            "yes" if row["fits"] else "no",
        )
    return table


def _best(plan: dict[str, Any]) -> str:
    best, budgets = plan["best"], plan["setting"]["budgets"]
    within = [f"{who} {in_bytes(size)}" for who, size in budgets.items() if size]
    limit = f" within {' and '.join(within)}" if within else ""
    if best is None:
        return f"no cut fits{limit}: lower the batch, train adapters, or hold weights in bf16"
    same = " (the one asked for)" if best == plan["model"]["cut"] else ""
    return (
        f"best cut{limit}: [bold]{best}[/bold]{same}, of those with a block at either end; a step "
        "sends the same bytes at every cut"
    )


def _against_fedavg(plan: dict[str, Any]) -> str:
    whole, seconds = plan["unsplit"], plan["seconds"]
    ratio = seconds["round"] / whole["round"]
    budget = plan["setting"]["budgets"]["client"]
    fits = "it fits" if whole["fits"] else "it does not fit"
    fits = f"{fits} within {in_bytes(budget)}" if budget else "if a client can hold that"
    holds = f"a client then holds {in_bytes(whole['peak'])}, not {in_bytes(plan['client']['peak'])}"
    faster = f"{ratio:.2g} times faster" if whole["faster"] else f"{1 / ratio:.2g} times slower"
    if abs(ratio - 1) < ALIKE:
        faster = "as fast"
    return f"unsplit FedAvg would be {faster}; {holds}: {fits}"


def _speed(who: str, setting: dict[str, Any]) -> str:
    speed = f"{in_short(setting[f'{who}_speed'])}FLOP/s"
    if setting[f"{who}_measured"]:
        return (
            f"the {who} is as fast as this machine now, {speed} measured on a block of the "
            f"model's shapes; give --{who}-flops for another"
        )
    return f"the {who} sustains {speed}; its optimizer's own time is left out"
