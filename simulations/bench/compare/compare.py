"""What does splitting cost and bring? The unsplit model beside every strategy, in one run.

``graft bench compare`` prints what `bench_compare` finds; docs/baseline.md explains it.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from simulations.bench.compare import report
from simulations.bench.compare.counted import count_quickly
from simulations.bench.compare.data import all_heldout
from simulations.bench.compare.fedavg.app import load_model, mean_loss
from simulations.bench.compare.flops import count_flops, full_batch
from simulations.bench.compare.memory import client_memory
from simulations.bench.compare.methods import run_central, run_method
from simulations.bench.compare.rows import (
    cpus,
    differences,
    headline,
    row_of,
    target_loss,
    weak_rows,
)
from simulations.bench.compare.settings import CENTRAL, QUICK, Compare, Start, config_of
from simulations.bench.compare.start import make_start
from simulations.launch.local_flower import local_superlink

Say = Callable[[str], None]


def bench_compare(
    quick: bool = False, folder: Path | None = None, say: Say = print
) -> dict[str, Any]:
    """Train in all ways on the same cores, data, seeds and tokens, and compare.

    Parameters
    ----------
    quick : bool
        A small model and few steps: its figures mean nothing.
    folder : Path, optional
        Leave `compare.json`, `compare.md` and `compare.png` there.
    say : callable
        Hears how it goes.

    Returns
    -------
    dict
        ``setting``, ``machine``, ``methods`` (a row for each), ``differences`` of held-out loss
        between methods that must coincide, ``flops``, ``memory``, ``weak`` (a row for each factor
        and bandwidth), ``headline`` and ``seconds`` of it all.
    """
    began, compare = time.monotonic(), QUICK if quick else Compare()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="graft-compare-") as name:
        scratch = Path(name)
        say("the base model learns ...")
        start = make_start(compare, scratch)
        torch.set_num_threads(1)
        try:
            result = _measure(compare, start, scratch, say)
        finally:
            torch.set_num_threads(threads)
    result["seconds"] = round(time.monotonic() - began, 1)
    if folder is not None:
        leave(result, folder)
    return result


def leave(result: Mapping[str, Any], folder: Path) -> None:
    """Write result, tables and figure into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    (folder / "compare.json").write_text(text, encoding="utf-8")
    (folder / "compare.md").write_text(report.markdown(result), encoding="utf-8")
    report.draw(result, folder / "compare.png")


def _measure(compare: Compare, start: Start, scratch: Path, say: Say) -> dict[str, Any]:
    config = config_of(compare, start, "splitfed-v1", scratch)
    runs = _train(compare, start, scratch, say)
    say("operations, bytes and memory ...")
    flops, memory = count_flops(config), client_memory(config)
    target = target_loss([run["rounds"][-1]["heldout"] for run in runs.values()])
    tokens = full_batch(config).tokens
    methods = {
        method: row_of(method, run, target, flops, memory, tokens) for method, run in runs.items()
    }
    say("weak clients ...")
    weak = weak_rows(compare, config, methods)
    return {
        "benchmark": "compare",
        "setting": asdict(compare),
        "machine": _machine(),
        "target_loss": target,
        "methods": methods,
        "differences": differences(methods),
        "flops": flops,
        "memory": memory,
        **weak,
        "headline": headline(methods, flops, memory, weak),
    }


def _train(compare: Compare, start: Start, scratch: Path, say: Say) -> dict[str, dict[str, Any]]:
    """Every method: its run, its model evaluated whole, and what Flower's messages hold."""
    runs = {}
    with local_superlink() as flower:
        for method in compare.methods:
            folder = scratch / method
            folder.mkdir()
            config = config_of(compare, start, method, folder)
            if method == CENTRAL:
                run = run_central(config, folder)
            else:
                run = run_method(flower, config, method, folder)
                run |= count_quickly(config, method, folder / "count")
            model = load_model(config, run["adapter"])
            run["heldout"] = mean_loss(model, all_heldout(config))[0]
            runs[method] = run
            say(f"{method}: held-out loss {run['heldout']:.4f}")
    return runs


def _machine() -> dict[str, Any]:
    return {
        "cpus": cpus(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
