"""The report as one HTML file that needs nothing else: figures and tables, for screen and paper."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from conf import VERSION
from flower_app.runs.instants import now
from simulations.report import tables
from simulations.report.curves import MOST_POINTS
from simulations.report.leakage import leakage
from simulations.report.numbers import PARTS
from simulations.report.words import lead, problems, tiles, title

FOLDER = Path(__file__).parent
MOST_DETAILED = 6
"""Runs that are shown by themselves."""
MOST_COLUMNS = 240
"""Of the timeline."""
MOST_LETTERS = 32
"""Of a client's name in a figure; of a longer one, its beginning and its end."""
AXES = {
    "steps": "steps",
    "rounds": "rounds",
    "seconds": "seconds",
    "tokens": "tokens",
    "mb": "MB",
}
ROOMS = {
    "rounds": "Rounds",
    "clients": "Clients",
    "traffic": "Traffic",
    "time": "Time",
    "memory": "Memory",
    "leakage": "Leakage",
    "participation": "Participation",
    "configuration": "Configuration",
    "environment": "Environment",
    "commands": "Commands",
}


def render(
    runs: Sequence[Any],
    comparison: Mapping[str, Any] | None,
    name: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Return the page.

    Parameters
    ----------
    runs : sequence of dict
        As `numbers.describe` returns them.
    comparison : mapping, optional
        Of several, as `compare.compare` returns it.
    name : str
        What they are together; empty: the run's name.
    notes : sequence of str
        What a reader must know besides.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    detailed = list(runs[:MOST_DETAILED])
    left = len(runs) - len(detailed)
    return environment.get_template("page.html").render(
        nonce=secrets.token_urlsafe(16),
        title=name or title(runs),
        lead=lead(runs[0]) if len(runs) == 1 else f"{len(runs)} runs side by side.",
        problems=[*notes, *(problems(runs[0]) if len(runs) == 1 else _several_problems(runs))],
        tiles=tiles(runs[0]) if len(runs) == 1 else [],
        runs=runs,
        overview=tables.overview(runs),
        comparison=comparison,
        differences=tables.differences(runs, comparison["differing"]) if comparison else None,
        seeds=tables.seeds(comparison) if comparison else None,
        tests=tables.tests(comparison) if comparison else None,
        axes=list(AXES.items()),
        curve_note=_curve_note(runs),
        detailed=[_detail(run) for run in detailed],
        left_out=left
        and f"{left} more runs are in the figures and tables above; graft report RUN shows one.",
        contents=_contents(runs, comparison),
        version=VERSION,
        made=tables.moment(now()),
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        data=_json(_data(runs, comparison)),
    )


def _contents(runs: Sequence[Any], comparison: Any) -> list[tuple[str, str]]:
    found = [("summary", "Summary")]
    found += [("comparison", "Comparison")] if comparison else []
    found.append(("learning", "Learning"))
    if len(runs) > 1:
        return found + [(f"run-{i}", run["name"]) for i, run in enumerate(runs[:MOST_DETAILED])]
    there = dict.fromkeys(ROOMS, True) | {
        "traffic": bool(runs[0]["rounds"]),
        "time": bool(runs[0]["rounds"]),
        "memory": bool(tables.memory(runs[0]).rows),
        "participation": bool(runs[0]["clients"]),
    }
    return found + [(f"{room}-0", words) for room, words in ROOMS.items() if there[room]]


def _detail(run: Mapping[str, Any]) -> dict[str, Any]:
    names = ("rounds", "clients", "phases", "memory", "missing", "changed", "configuration")
    told = {name: getattr(tables, name)(run) for name in (*names, "environment")}
    columns = len(run["participation"])
    return told | {
        "leakage": leakage(run),
        "name": run["name"],
        "folder": run["folder"],
        "lead": (run["label"] != run["name"]) * f"{run['label']}. " + lead(run),
        "problems": problems(run),
        "commands": run["commands"],
        "has": {
            "clients_heldout": bool(run["curves"]["clients_heldout"]),
            "steps": bool(run["steps"]["round"]),
            "cut": f"The last {MOST_COLUMNS} of {columns} are drawn; JSON has all."
            if columns > MOST_COLUMNS
            else "",
        },
    }


def _several_problems(runs: Sequence[Any]) -> list[str]:
    return [f"{run['name']}: {words}" for run in runs for words in problems(run)]


def _curve_note(runs: Sequence[Any]) -> str:
    each = max((run["curves"]["train"]["each"][0] for run in runs), default=1)
    own = max((c["each"][0] for run in runs for c in run["curves"]["clients"].values()), default=1)
    words = "Training curves are smoothed over a fortieth of their points. "
    if each > 1 or own > 1:
        words += (
            f"They are thinned to {MOST_POINTS} points a run, those of clients further: a point "
            f"is the mean over {each} and {own} steps; JSON has every step. "
        )
    if len(runs) > 4:
        words += "With more than four runs training is not drawn. "
    return words + "Perplexity is e to the loss."


def _data(runs: Sequence[Any], comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the figures are drawn from."""
    told: dict[str, Any] = {"runs": [_run_data(run) for run in runs]}
    if comparison:
        settings = [
            {"setting": s["setting"], "band": s["band"], "runs": s["places"]}
            for s in comparison["settings"]
        ]
        told["comparison"] = {"settings": settings}
    return told


def _run_data(run: Mapping[str, Any]) -> dict[str, Any]:
    rounds, clients = run["rounds"], run["clients"]
    columns: dict[str, list[Any]] = {
        "round": [each["round"] for each in rounds],
        "up": [each["bytes_up"] / 1e6 for each in rounds],
        "down": [each["bytes_down"] / 1e6 for each in rounds],
        **{part: [round(each[f"{part}_seconds"], 3) for each in rounds] for part in PARTS},
    }
    kinds = {
        "server": "server_mb",
        "server's peak": "server_peak_mb",
        "GPU's peak": "gpu_peak_mb",
        "largest client's peak": "client_peak_mb",
    }
    kept = {words: [r[key] for r in rounds] for words, key in kinds.items()}
    return {
        "label": run["label"],
        "curves": run["curves"],
        "rounds": columns,
        "parts": PARTS,
        "clients": {
            "name": [each["client"] for each in clients],
            "place": places([each["client"] for each in clients]),
            "up": [each["bytes_up"] / 1e6 for each in clients],
            "down": [each["bytes_down"] / 1e6 for each in clients],
        },
        "memory": {words: values for words, values in kept.items() if any(values)},
        "participation": _timeline(run),
    }


def _timeline(run: Mapping[str, Any]) -> dict[str, Any]:
    names = [each["client"] for each in run["clients"]]
    askings = run["participation"][-MOST_COLUMNS:]
    reasons = {
        f"{i},{j}": each["missing"][name]
        for j, each in enumerate(askings)
        for i, name in enumerate(names)
        if name in each["missing"]
    }
    return {
        "clients": names,
        "rows": places(names),
        "columns": [each["label"] for each in askings],
        "outcomes": [
            [each["outcomes"].get(name, "not asked") for each in askings] for name in names
        ],
        "reasons": reasons,
    }


def places(names: Sequence[str]) -> list[str]:
    """Return what stands in a figure for each name: short, and no two alike.

    Bars and rows whose places are called the same would be drawn as one.
    """
    found: dict[str, None] = {}
    for name in names:
        short = name if len(name) <= MOST_LETTERS else f"{name[:20]}…{name[-11:]}"
        alike = (f"{short} ({number})" for number in count(2))
        found[next(each for each in chain([short], alike) if each not in found)] = None
    return list(found)


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
