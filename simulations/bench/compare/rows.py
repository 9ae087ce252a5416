"""What the comparison tells of each method and of weak clients, from what was measured."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from conf.schema import Config
from simulations.bench.compare.settings import CENTRAL, FEDAVG, SAME, Compare
from simulations.bench.compare.weak import Emulation, predicted_split


def target_loss(last: list[float]) -> float:
    """The worst of the final losses, rounded up to thousandths: all methods come so far."""
    return math.ceil(max(last) * 1000) / 1000


def row_of(
    method: str,
    run: Mapping[str, Any],
    target: float,
    flops: Mapping[str, int],
    memory: Mapping[str, Mapping[str, float]],
    tokens: int,
) -> dict[str, Any]:
    """A method's row: seconds, bytes, operations and memory.

    Parameters
    ----------
    method : str
        One of `METHODS`.
    run : mapping
        Of `run_method` or `run_central`, with what `count_round` found.
    target : float
        Held-out loss whose time is told.
    flops, memory : mapping
        Of `count_flops` and `client_memory`.
    tokens : int
        That count in the micro-batch of `count_flops`.
    """
    rounds = run["rounds"][1:]
    mean = {
        name: statistics.mean(each.get(name, 0.0) for each in rounds)
        for name in ("seconds", "client", "server", "network", "tokens", "bytes_up", "bytes_down")
    }
    averaging = run.get("averaging", 0.0)
    steps = [each for row in rounds for each in row["steps"]]
    of_client, of_server = operations(method, flops)
    known = mean["client"] + mean["server"] + mean["network"] + averaging
    role = None if method == CENTRAL else "whole" if method == FEDAVG else "ends"
    return {
        "step_seconds": statistics.median(steps),
        "round_seconds": mean["seconds"],
        "client_seconds": mean["client"],
        "server_seconds": mean["server"],
        "network_seconds": mean["network"],
        "averaging_seconds": averaging,
        "rest_seconds": mean["seconds"] - known,
        "start_seconds": run["start_seconds"],
        "target_seconds": _seconds_to(rounds, target),
        "tokens_per_second": mean["tokens"] / mean["seconds"],
        "heldout_loss": run["heldout"],
        "client_memory_mb": memory[role]["peak_mb"] if role else None,
        "client_flops_per_token": of_client / tokens,
        "server_flops_per_token": of_server / tokens,
        "bytes_up_per_token": mean["bytes_up"] / mean["tokens"],
        "bytes_down_per_token": mean["bytes_down"] / mean["tokens"],
        "flower_up_per_round": run.get("flower_up", 0.0),
        "flower_down_per_round": run.get("flower_down", 0.0),
        "curve": _curve(run["rounds"]),
    }


def operations(method: str, flops: Mapping[str, int]) -> tuple[int, int]:
    """Operations of a micro-batch at the client and at the server."""
    if method == CENTRAL:
        return 0, flops["whole"]
    if method == FEDAVG:
        return flops["whole"], 0
    again = flops["again"] if method == "messages" else 0
    return flops["bottom"] + flops["top"] + again, flops["trunk"]


def _curve(rounds: list[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Seconds since training began, and held-out loss, before it and after each round."""
    seconds, curve = 0.0, []
    for row in rounds:
        seconds += row["whole"] if row["round"] else 0.0
        curve.append((round(seconds, 3), row["heldout"]))
    return curve


def _seconds_to(rounds: list[Mapping[str, Any]], target: float) -> float | None:
    seconds = 0.0
    for row in rounds:
        seconds += row["whole"]
        if row["heldout"] <= target:
            return seconds
    return None


def differences(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Of final held-out loss, between methods that must coincide."""
    return {
        f"{one} - {other}": methods[one]["heldout_loss"] - methods[other]["heldout_loss"]
        for one, other in SAME.items()
        if {one, other} <= set(methods)
    }


def weak_rows(
    compare: Compare, config: Config, methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Measure weak clients, and set the formula beside it.

    Parameters
    ----------
    compare : Compare
        Factors and bandwidths.
    config : Config
        Of splitfed-v1.
    methods : mapping
        Rows of `row_of`: what a round's messages hold.
    """
    with Emulation(config, compare.weak_steps) as emulation:
        one = emulation.split(1)
        whole = {slow: emulation.unsplit(slow) for slow in compare.slow}
        points = {
            (megabits, slow): emulation.split(slow, megabits)
            for megabits in compare.megabits
            for slow in compare.slow
        }
    alone = whole[compare.slow[0]].client
    overhead, cores = max(0.0, one.step - one.client - one.trunk), cpus()
    rows = []
    for (megabits, slow), point in points.items():
        sync = {name: _sync(methods[name], compare.local_steps, megabits)
                for name in (FEDAVG, "splitfed-v1")}  # fmt: skip
        told = predicted_split(
            one, slow=slow, megabits=megabits, clients=compare.clients, cores=cores,
            overhead=overhead,
        )  # fmt: skip
        rows.append(
            {
                "megabits": megabits,
                "slow": slow,
                "unsplit": whole[slow].step,
                "unsplit_predicted": slow * alone,
                "split": point.step,
                "split_predicted": told,
                "unsplit_with_messages": whole[slow].step + sync[FEDAVG],
                "split_with_messages": point.step + sync["splitfed-v1"],
                "most_clients": int(cores * told / one.trunk),
            }
        )
    parts = {"whole": alone, "overhead": overhead, **asdict(one)}
    even = {str(m): break_even(parts, m) for m in compare.megabits}
    return {"weak": rows, "weak_parts": parts, "break_even": even}


def _sync(row: Mapping[str, Any], steps: int, megabits: float) -> float:
    """Seconds that a round's Flower messages take on the line, for each of its steps."""
    held = row["flower_up_per_round"] + row["flower_down_per_round"]
    return float(8 * held / (megabits * 1e6) / steps)


def break_even(parts: Mapping[str, float], megabits: float) -> float | None:
    """How many times slower a client must compute for a split step to be the quicker one.

    None if it never is. The trunk is not full.
    """
    saved = parts["whole"] - parts["client"]
    wire = 8 * (parts["bytes_up"] + parts["bytes_down"]) / (megabits * 1e6)
    return (parts["trunk"] + wire + parts["overhead"]) / saved if saved > 0 else None


def headline(
    methods: Mapping[str, Mapping[str, Any]],
    flops: Mapping[str, int],
    memory: Mapping[str, Mapping[str, float]],
    weak: Mapping[str, Any],
) -> dict[str, Any]:
    """What splitting costs and brings, in a few numbers."""
    split, whole = methods["splitfed-v1"], methods[FEDAVG]
    return {
        "step_ratio": split["step_seconds"] / whole["step_seconds"],
        "throughput_ratio": split["tokens_per_second"] / whole["tokens_per_second"],
        "flops_share": operations("splitfed-v1", flops)[0] / flops["whole"],
        "memory_share": memory["ends"]["peak_mb"] / memory["whole"]["peak_mb"],
        "bytes_per_token": split["bytes_up_per_token"] + split["bytes_down_per_token"],
        "break_even": weak["break_even"],
    }


def cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
