"""The sentences of a report: what was run, how it ended, what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flower_app.runs.folders import FAILED, FINISHED, STOPPED
from flower_app.runs.history import RUNNING
from simulations.report.tables import NONE, duration, figure, loss, megabytes, moment, whole

Run = Mapping[str, Any]
NAMED = 6
"""Clients that a sentence names."""


def title(runs: Sequence[Run]) -> str:
    """Return a heading."""
    return runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"


def lead(run: Run) -> str:
    """Return in a sentence what was run, by whom, and how it ended."""
    config, told = run["config"], run["summary"]
    what = f"{run['experiment'] or 'a run'}: {run['model'] or 'a model not on record'}"
    known = {"cut.bottom", "cut.top"} <= config.keys()
    cut = f"cut {config['cut.bottom']} + {config['cut.top']}" if known else ""
    names = [each["client"] for each in run["clients"]]
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    some = "1 client" if len(names) == 1 else f"{len(names)} clients"
    who = f"{some} ({', '.join(names[:NAMED])}{rest})" if names else "no clients"
    adapted = ", ".join(f"{share:.0%} of the {role}" for role, share in told["adapted"].items())
    parts = [
        what,
        cut,
        str(config.get("train.strategy", "")),
        str(config.get("link.transport", "")),
        f"LoRA on {adapted}" if adapted else "",
        who,
        f"seed {run['seed']}" if run["seed"] is not None else "",
    ]
    return f"{'; '.join(part for part in parts if part)}. {ending(run)}"


def ending(run: Run) -> str:
    """Return how it ended, or how it stands."""
    told = run["summary"]
    of = f"{told['rounds']} of {told['planned'] if told['planned'] is not None else '?'} rounds"
    began = f"Begun {moment(run['started'])}" if run["started"] else "Begun at an unknown time"
    ends = {
        RUNNING: f"still going when this was written, with {of} done",
        FINISHED: f"finished after {of}",
        STOPPED: f"stopped after {of}, as it was asked to",
        FAILED: f"failed after {of}",
    }
    words = ends.get(run["status"], f"neither finished nor going: stopped or killed after {of}")
    again = run["resumed_after"]
    resumed = f"; resumed after round {', '.join(map(str, again))}" if again else ""
    return f"{began}, {words}{resumed}."


def problems(run: Run) -> list[str]:
    """Return what a reader must know first: why it failed, what its record lacks."""
    found = [f"The run failed: {run['error']}"] if run["status"] == FAILED else []
    if run["status"] not in (RUNNING, FINISHED, STOPPED, FAILED):
        found.append("This run was stopped or killed: its figures are those up to then.")
    return found + list(run["notes"])


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """Return name, value and remark of what a run came to."""
    told = run["summary"]
    best = (
        f"best {loss(told['heldout_best'])} in round {told['best_round']}"
        if told["heldout_best"] is not None
        else "not evaluated"
    )
    peaks = [f"server {whole(told['server_peak_mb'])} MB at most"] if told["server_peak_mb"] else []
    peaks += [f"a client {whole(told['client_peak_mb'])} MB"] if told["client_peak_mb"] else []
    moved = f"{megabytes(told['bytes_up'])} ↑  {megabytes(told['bytes_down'])} ↓"
    per_token = (told["bytes_up"] + told["bytes_down"]) / told["tokens"] if told["tokens"] else None
    found = [
        ("held-out loss", f"{loss(told['heldout_first'])} → {loss(told['heldout_last'])}", best),
        (
            "perplexity",
            f"{figure(told['perplexity_first'])} → {figure(told['perplexity_last'])}",
            "on held-out text",
        ),
        ("tokens trained on", whole(told["tokens"]), f"{told['clients']} clients"),
        ("MB up and down", moved, f"{whole(per_token)} bytes a token"),
        ("time", duration(told["seconds"]), "; ".join(peaks) or "of running"),
        ("tokens per second", whole(told["tokens_per_second"]), "over the whole run"),
    ]
    return [(words, value.replace(NONE + " → " + NONE, NONE), more) for words, value, more in found]
