"""Runs that are disturbed on purpose, and what became of them.

Every schedule is a whole run of the app in this process: two clients, a trunk behind real gRPC, two
rounds, checkpoints. Frames meet faults both ways, a client may die in mid-round, the trunk may die
and the run be resumed. The outcome must be that of the undisturbed run, bit for bit, or an error
from the list in docs/reliability.md.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from simulations.disturb.chaos_run import POLICIES, Plan, Result, draw_plan, run_plan, undisturbed

WINDOWS, CODECS = (4,), ("fp32", "int4")
"""Of a run's `link.window` and `link.codec`, by default."""

WORKERS = 6
"""Processes: most of a disturbed run is spent waiting for what does not come."""


@dataclass(kw_only=True)
class Summary:
    """What became of all schedules."""

    schedules: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    """Frames that met each kind of fault."""
    clients_killed: int = 0
    trunks_killed: int = 0
    survived: int = 0
    """Ended with the weights of the undisturbed run, bit for bit."""
    ended: Counter[str] = field(default_factory=Counter)
    """Ended with a documented error, by its first words."""
    lost: list[str] = field(default_factory=list)
    """Ended otherwise: which, and how. There must be none."""
    by_policy: Counter[str] = field(default_factory=Counter)
    by_way: Counter[str] = field(default_factory=Counter)
    """Schedules by codec and window."""
    reconnects: int = 0
    """Streams that were tried after a session's first."""

    def add(self, plan: Plan, result: Result) -> None:
        """Count one schedule."""
        self.schedules += 1
        self.faults.update(result.faults)
        self.clients_killed += result.clients_killed
        self.trunks_killed += result.trunks_killed
        self.reconnects += result.reconnects
        self.by_policy[plan.policy] += 1
        self.by_way[f"{plan.codec}, window {plan.window}"] += 1
        if result.verdict == "survived":
            self.survived += 1
        elif result.verdict == "ended":
            self.ended[result.words] += 1
        else:
            self.lost.append(f"schedule {plan.seed} ({plan.way}): {result.words}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counters = {"faults", "ended", "by_policy", "by_way"}
        plain = {n: dict(v) if n in counters else v for n, v in vars(self).items()}
        return {**plain, "faults_injected": self.faults.total()}


def run_chaos(
    schedules: int = 200,
    seed: int = 0,
    *,
    policies: Iterable[str] = tuple(POLICIES),
    windows: Iterable[int] = WINDOWS,
    codecs: Iterable[str] = CODECS,
    say: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Run schedules, some at a time.

    Parameters
    ----------
    schedules : int
        How many; number i has the seed `seed` + i, and its policy in turn.
    seed : int
        Of the first.
    policies : iterable of str
        Of `POLICIES`.
    windows, codecs : iterable
        Of `link.window` and `link.codec`: every combination with each policy has its turn.
    say : callable
        Takes a line for each schedule.

    Returns
    -------
    Summary
        Of all.
    """
    ways = list(itertools.product(codecs, windows, policies))
    plans = []
    for number in range(schedules):
        codec, window, policy = ways[number % len(ways)]
        plans.append(draw_plan(seed + number, policy, window=window, codec=codec))
    started, summary = time.monotonic(), Summary()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="graft-chaos-") as folder,
        context.Pool(min(WORKERS, schedules), _prepare, (folder,)) as pool,
    ):
        alone = sorted({(plan.policy, plan.codec) for plan in plans})
        pool.map(_keep_undisturbed, alone, chunksize=1)
        for plan, result in pool.imap_unordered(_run, plans):
            summary.add(plan, result)
            met = ", ".join(f"{count} x {kind}" for kind, count in sorted(result.faults.items()))
            say(
                f"{summary.schedules:>4}/{schedules}  schedule {plan.seed:<5} {plan.way:<28} "
                f"{result.verdict:<8} {result.seconds:5.1f} s  {plan.deaths():<24} {met}"
                + (f"  {result.words}" if result.words else "")
            )
        pool.close()  # let the workers end by themselves
        pool.join()
    summary.seconds = round(time.monotonic() - started, 1)
    return summary


def render(summary: Summary) -> str:
    """The summary as lines."""
    faults = ", ".join(f"{count} x {kind}" for kind, count in sorted(summary.faults.items()))
    lines = [
        f"{summary.schedules} schedules in {summary.seconds:.0f} s "
        f"({', '.join(f'{count} {name}' for name, count in sorted(summary.by_policy.items()))}; "
        f"{', '.join(f'{count} {way}' for way, count in sorted(summary.by_way.items()))})",
        f"injected: {summary.faults.total()} faults of frames ({faults}), "
        f"{summary.clients_killed} clients killed, {summary.trunks_killed} trunks killed",
        f"streams tried after a session's first: {summary.reconnects}",
        f"survived: {summary.survived}, with the undisturbed run's weights bit for bit",
        f"ended with a documented error: {summary.ended.total()}",
        *(f"  {count} x {words}" for words, count in summary.ended.items()),
        f"lost: {len(summary.lost)}",
        *(f"  {words}" for words in summary.lost),
    ]
    return "\n".join(lines)


_common: list[Path] = []
"""In a worker process, the folder that all share."""


def _prepare(folder: str) -> None:
    torch.set_num_threads(1)
    _common[:] = [Path(folder)]


def _keep_undisturbed(which: tuple[str, str]) -> None:
    """Run undisturbed, and keep what it ends with for all workers."""
    policy, codec = which
    save_file(undisturbed(policy, _common[0], codec), _place(policy, codec))


def _place(policy: str, codec: str) -> Path:
    return _common[0] / f"{policy}-{codec}.safetensors"


def _run(plan: Plan) -> tuple[Plan, Result]:
    result = run_plan(plan, _common[0], load_file(_place(plan.policy, plan.codec)))
    json.dumps(asdict(result))  # plain data only goes back
    return plan, result
