"""How well does each way of training learn? Six methods, two divisions of the text, a few seeds.

``graft study ways`` runs it without Flower, in as many processes as there are cores, and leaves
`study.json`, `study.md` and `study.png`. Every method sees the same tokens: the same micro-batches
in the same order per client, from the same random weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import platform
import pydoc_data.topics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from flower_app.data.client import batches
from models import Cut, build_scratch
from simulations.equality.reference import heldout_loss
from simulations.study import methods as study_methods
from simulations.study import plot as study_plot
from simulations.study.methods import METHODS, SAME
from simulations.study.plot import DIVISIONS
from simulations.study.settings import Study, cohort_of, divergence, load_clients, scratch


@dataclass(frozen=True)
class Job:
    """One curve to be computed."""

    method: str
    division: str
    seed: int
    lr: float


@dataclass
class Curve:
    """Held-out loss of the global model before training and after every round."""

    method: str
    division: str
    seed: int
    lr: float
    tokens: list[int] = field(default_factory=list)
    """Tokens learned from so far, over all clients."""
    steps: list[int] = field(default_factory=list)
    """Optimizer steps so far, one after the other, of the blocks that the trunk has."""
    losses: list[float] = field(default_factory=list)
    heldout_tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def last(self) -> float:
        """The loss after the last round; what is no number counts as infinite."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf


def run_study(
    study: Study, folder: Path, say: Callable[[str], None] = print, workers: int = 0
) -> dict[str, Any]:
    """Run the study and write its three files.

    Parameters
    ----------
    study : Study
        What is run.
    folder : Path
        Where to; created.
    say : callable
        Hears of each curve.
    workers : int
        Processes; 0: as many as there are cores.

    Returns
    -------
    dict
        What `study.json` holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    curves = sorted(compute(study, say, workers), key=_place)
    result = {
        "study": asdict(study),
        "divisions": {division: described(study, division) for division in DIVISIONS},
        "versions": versions(),
        "workers": workers or os.cpu_count(),
        "seconds": round(time.perf_counter() - started, 1),
        "rates": chosen_rates(study, curves),
        "differences": differences(curves),
        "curves": [asdict(curve) for curve in curves],
    }
    (folder / "study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = study_plot.table(result)
    (folder / "study.md").write_text(table, encoding="utf-8")
    study_plot.plot(result, folder / "study.png")
    say(table)
    return result


def compute(study: Study, say: Callable[[str], None], workers: int = 0) -> Iterator[Curve]:
    """Yield every curve: first those of the search for learning rates, then the rest."""
    with _pool(workers or os.cpu_count() or 1) as run:
        searched = [
            Job(method, division, study.seeds[0], lr)
            for division in DIVISIONS
            for method in METHODS
            if method not in SAME
            for lr in study.rates
        ]
        found = list(_told(run(study, searched), len(searched), say))
        yield from found
        rates = chosen_rates(study, found)
        done = {(c.method, c.division, c.seed, c.lr) for c in found}
        rest = [
            Job(method, division, seed, lr)
            for seed in study.seeds
            for division in DIVISIONS
            for method in METHODS
            if (method, division, seed, lr := rates[division][method]) not in done
        ]
        yield from _told(run(study, rest), len(rest), say)


def run_job(study: Study, job: Job) -> Curve:
    """Compute one curve, in this process."""
    started, cpu_before = time.perf_counter(), time.process_time()
    model = build_scratch(scratch(study), job.seed)
    train = study.train(job.method, job.lr)
    learn = study_methods.start(job.method, model, train, Cut(*study.cut), study.clients)
    clients = load_clients(study, job.division, job.seed)
    heldout = [b for c in clients for b in batches(c.heldout, 8 * study.batch_size, pad_id=0)]
    curve = Curve(job.method, job.division, job.seed, job.lr)
    loss, curve.heldout_tokens = heldout_loss(model, heldout)
    curve.tokens, curve.steps, curve.losses = [0], [0], [loss]
    turns = study.clients if job.method == "splitfed-v2" else 1
    for number in range(1, study.rounds + 1):
        cohort = cohort_of(study, clients, job.seed, number)
        learn(cohort, number)
        seen = sum(batch.tokens for own in cohort for step in own for batch in step)
        curve.tokens.append(curve.tokens[-1] + seen)
        curve.steps.append(curve.steps[-1] + turns * study.local_steps)
        curve.losses.append(heldout_loss(model, heldout)[0])
    curve.seconds = round(time.perf_counter() - started, 1)
    curve.cpu_seconds = round(time.process_time() - cpu_before, 1)
    return curve


def chosen_rates(study: Study, curves: Iterable[Curve]) -> dict[str, dict[str, float]]:
    """The learning rate of each division and method: the best of the search.

    Methods that must coincide share one: that of plain PyTorch.
    """
    best: dict[tuple[str, str], Curve] = {}
    for curve in curves:
        key = curve.division, curve.method
        searched = curve.seed == study.seeds[0] and curve.method not in SAME
        if searched and (key not in best or curve.last < best[key].last):
            best[key] = curve
    return {
        division: {method: best[division, SAME.get(method, method)].lr for method in METHODS}
        for division in DIVISIONS
    }


def differences(curves: Sequence[Curve]) -> dict[str, float]:
    """Largest difference of held-out loss, in any round, from the method it must coincide with."""
    by_key = {(c.method, c.division, c.seed, c.lr): c.losses for c in curves}
    return {
        method: max(
            abs(one - two)
            for (name, *rest), losses in by_key.items()
            if name == method
            for one, two in zip(losses, by_key[other, *rest], strict=True)  # type: ignore[index]
        )
        for method, other in SAME.items()
    }


def described(study: Study, division: str) -> dict[str, Any]:
    """What the first seed gives to the clients: bytes to train on, and how much they differ."""
    clients = load_clients(study, division, study.seeds[0])
    return {
        "bytes": [sum(len(example.input_ids) for example in data.train) for data in clients],
        "divergence": round(divergence(clients), 4),
    }


def versions() -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    text = json.dumps(pydoc_data.topics.topics, sort_keys=True)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


_Run = Callable[[Study, Sequence[Job]], Iterator[Curve]]


@contextmanager
def _pool(workers: int) -> Iterator[_Run]:
    """What runs jobs: processes of one thread each, or this process if one is enough."""
    if workers == 1:
        yield lambda study, jobs: (run_job(study, job) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:

        def run(study: Study, jobs: Sequence[Job]) -> Iterator[Curve]:
            for future in as_completed([pool.submit(run_job, study, job) for job in jobs]):
                yield future.result()

        yield run


def _place(curve: Curve) -> tuple[object, ...]:
    return curve.division, list(METHODS).index(curve.method), curve.seed, curve.lr


def _told(curves: Iterable[Curve], total: int, say: Callable[[str], None]) -> Iterator[Curve]:
    for number, curve in enumerate(curves, start=1):
        say(
            f"{number}/{total}  {DIVISIONS[curve.division]}, {METHODS[curve.method]}, "
            f"seed {curve.seed}, lr {curve.lr:g}: held-out loss {curve.losses[0]:.3f} -> "
            f"{curve.losses[-1]:.3f} in {curve.seconds:.0f} s"
        )
        yield curve
