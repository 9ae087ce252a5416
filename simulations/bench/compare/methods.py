"""The methods as they are run, and what each amounted to: under Flower, or in a process alone."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from conf.schema import Config
from simulations.bench.compare.data import all_heldout, client_steps
from simulations.bench.compare.fedavg import app as fedavg
from simulations.bench.compare.settings import FEDAVG, write_config
from simulations.equality.reference import concatenated
from simulations.launch.local_flower import PROJECT, LocalFlower
from simulations.launch.run import RAY_LATE

FEDAVG_APP = Path(fedavg.__file__).parent


def run_central(config: Config, folder: Path, threads: int = 1) -> dict[str, Any]:
    """Train where all data is in one place, in a process of its own.

    A step takes what every client takes in its step, as one batch; one optimizer for all rounds.

    Returns
    -------
    dict
        As `run_method`.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(train_central, config, folder, threads).result()


def train_central(config: Config, folder: Path, threads: int) -> dict[str, Any]:
    """Do what `run_central` does, in this process; of each round its steps' ``losses`` besides."""
    torch.set_num_threads(threads)
    model, held = fedavg.load_model(config), list(all_heldout(config))
    optimizer = fedavg.plain_optimizer(model, config.train)
    rounds = [{"round": 0, "heldout": fedavg.mean_loss(model, held)[0], "whole": 0.0}]
    for number in range(1, config.train.rounds + 1):
        cohort = [client_steps(config, each, number) for each in range(_clients(config))]
        steps = [[concatenated([b for own in each for b in own])] for each in zip(*cohort)]  # noqa: B905
        began = time.monotonic()
        done = fedavg.train_steps(model, steps, config.train, optimizer, number)
        seconds = time.monotonic() - began
        rounds.append(
            {
                "round": number,
                "heldout": fedavg.mean_loss(model, held)[0],
                "seconds": seconds,
                "whole": time.monotonic() - began,
                "tokens": done.tokens,
                "steps": done.seconds,
                "losses": done.losses,
                "server": sum(done.seconds),
            }
        )
    model.save_pretrained(str(folder / "model"))
    return {"start_seconds": 0.0, "rounds": rounds, "adapter": str(folder / "model")}


def run_method(flower: LocalFlower, config: Config, method: str, folder: Path) -> dict[str, Any]:
    """Run a method under Flower, all clients at once, each on one CPU.

    Returns
    -------
    dict
        ``start_seconds``: from the command to its end, without the rounds; ``adapter``: folder of
        the trained adapter; ``rounds``: for each ``heldout`` loss, ``seconds`` of training and of
        the ``whole`` with evaluation, ``tokens``, seconds of each of a client's ``steps``, and the
        seconds of a client, a mean over clients: ``client``, ``server`` and ``network``.
    """
    clients, path = _clients(config), write_config(config, folder / f"{method}.yaml")
    resources = f"client-resources-num-cpus=1 init-args-num-cpus={clients}"
    app = FEDAVG_APP if method == FEDAVG else PROJECT
    for _ in range(2):
        began = time.monotonic()
        outcome = flower.run(str(path), federation=f"num-supernodes={clients} {resources}", app=app)
        seconds = time.monotonic() - began
        if not any(RAY_LATE in line for line in outcome.lines):
            break
    if not outcome.completed:
        raise RuntimeError(f"{method}: {outcome.explain()}")
    if method == FEDAVG:
        run, rounds = folder, _fedavg_rounds(folder)
    else:
        assert outcome.folder is not None, "a completed run has a folder"
        run = outcome.folder
        rounds = graft_rounds(_lines(run / "metrics.jsonl"), clients)
    start = seconds - sum(each["whole"] for each in rounds)
    return {"start_seconds": start, "rounds": rounds, "adapter": str(run / "model")}


def _fedavg_rounds(folder: Path) -> list[dict[str, Any]]:
    found = []
    for told in json.loads((folder / "history.json").read_text(encoding="utf-8")):
        own = told["clients"]
        row = {name: told[name] for name in ("round", "heldout", "whole", "seconds", "averaging")}
        if own:
            row["tokens"] = sum(each["num-tokens"] for each in own)
            row["steps"] = [each for client in own for each in client["seconds"]]
            row["client"] = statistics.mean(sum(client["seconds"]) for client in own)
        found.append(row)
    return found


def graft_rounds(records: Sequence[Mapping[str, Any]], clients: int) -> list[dict[str, Any]]:
    """What `run_method` returns for each round, from the lines of a run's journal."""
    found = []
    trained = {each["round"]: each for each in records if each["kind"] == "trained"}
    for told in (each for each in records if each["kind"] == "round"):
        number = told["round"]
        row = {"round": number, "heldout": told["evaluate"]["loss"], "whole": told["seconds"]}
        steps = [each for each in records if each["kind"] == "step" and each["round"] == number]
        if steps:
            parts = {name: sum(each["seconds"][name] for each in steps) / clients
                     for name in ("bottom", "trunk", "top", "network")}  # fmt: skip
            row |= {
                "seconds": trained[number]["seconds"],
                "tokens": told["tokens"],
                **{name: sum(each[name] for each in steps) for name in ("bytes_up", "bytes_down")},
                "client": parts["bottom"] + parts["top"],
                "server": parts["trunk"],
                "network": parts["network"],
                "steps": _between(steps),
            }
        found.append(row)
    return found


def _between(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds from each client's step to its next one."""
    found = []
    for name in {each["client"] for each in steps}:
        times = [datetime.fromisoformat(s["time"]) for s in steps if s["client"] == name]
        found += [(later - one).total_seconds() for one, later in pairwise(times)]
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _clients(config: Config) -> int:
    return config.federation.min_clients
