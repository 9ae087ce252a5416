"""Many clients, few of them in a round: how long it takes, and whether memory grows by the round.

The app runs under Flower's default simulation resources, which on two cores means one client at a
time. Flower's simulation lives in the ServerApp's process, so that its memory is in that figure.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from simulations.launch.local_flower import temporary_folder
from simulations.launch.run import run_experiment

TRANSPORTS = ("stream", "messages")
MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
DATA = {"partitioner": "iid", "context": 64, "max_examples": 20}
BATCH = 4
PERIOD = 0.25
"""Seconds between two looks at the processes."""
MEMORY = ("server", "server_own", "clients", "total")
_MIB = 2**20


def bench_scale(
    clients: int = 100,
    fraction: float = 0.1,
    rounds: int = 5,
    steps: int = 2,
    transport: str = "both",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run a tiny model with many simulated clients and watch time and memory round by round.

    Parameters
    ----------
    clients : int
        Simulated clients.
    fraction : float
        Share of them that trains, and that evaluates, in a round.
    rounds, steps : int
        Rounds, and optimizer steps of a client in each.
    transport : str
        stream, messages or both.
    say : callable
        Takes one line on the progress.

    Returns
    -------
    dict
        The setting; for each transport and round the resident memory of the ServerApp, of the
        simulated clients' processes and of all processes together (medians over the round, MiB),
        seconds, tokens and Flower messages; and for each transport the totals.
    """
    if transport not in (*TRANSPORTS, "both"):
        raise ValueError(f"--transport {transport}: stream, messages or both")
    if rounds < 3:
        raise ValueError(f"--rounds {rounds}: growth is measured from round 2 on; take 3 or more")
    asked = max(1, round(fraction * clients))
    result: dict[str, Any] = {
        "benchmark": "scale",
        "clients": clients,
        "clients_per_round": asked,
        "rounds": rounds,
        "local_steps": steps,
        "batch": BATCH,
        "context": DATA["context"],
        "model": f"{MODEL['num_hidden_layers']} x {MODEL['hidden_size']}",
    }
    for name in TRANSPORTS if transport == "both" else (transport,):
        say(f"{clients} clients, {asked} in a round, over {name} ...")
        result |= _run(name, clients, fraction, asked, rounds, steps, say)
    return result


def _run(
    transport: str,
    clients: int,
    fraction: float,
    asked: int,
    rounds: int,
    steps: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    with temporary_folder() as folder:
        settings = {
            **{f"model.scratch.{key}": value for key, value in MODEL.items()},
            **{f"data.{key}": value for key, value in DATA.items()},
            "train.rounds": rounds,
            "train.local_steps": steps,
            "train.batch_size": BATCH,
            "federation.fraction_train": fraction,
            "federation.fraction_evaluate": fraction,
            "federation.min_clients": asked,
            "link.transport": transport,
            "output.folder": folder,
            "output.save_model": "false",
        }
        overrides = shlex.join(f"{key}={value}" for key, value in settings.items())
        with Sampler(Path(folder)) as sampler:
            outcome = run_experiment("demo", overrides, clients=clients, say=say)
        summary = outcome.summary()
    return report(transport, sampler.records, sampler.samples, summary)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Resident memory at one moment, in MiB."""

    round: int
    """The round that is going on; 0 before the first."""
    server: float
    """The ServerApp, with Flower's simulation engine in the same process."""
    server_own: float
    """The same without pages that it shares: libraries, and Ray's object store."""
    clients: float
    """The processes in which simulated clients run."""
    total: float
    """These, the SuperLink and Ray."""


@dataclass
class Sampler:
    """Watches this process's descendants while a run writes its records.

    Parameters
    ----------
    folder : Path
        Parent of the run folder.
    """

    folder: Path
    samples: list[Sample] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    """The run's records so far."""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="graft-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.records = read_records(self.folder)

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            self.records = read_records(self.folder)
            ended = sum(record["kind"] == "round" for record in self.records)
            if (sizes := resident())["server"]:
                self.samples.append(Sample(round=ended, **sizes))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return what the newest run under a folder has recorded.

    Parameters
    ----------
    folder : Path
        Parent of run folders.

    Returns
    -------
    list of dict
        Steps and rounds; a line that is being written is left out.
    """
    files = sorted(folder.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    lines = files[-1].read_text(encoding="utf-8").split("\n")[:-1] if files else []
    return [json.loads(line) for line in lines]


def resident() -> dict[str, float]:
    """Return the resident memory of this process's descendants, in MiB.

    Pages that processes share count for each of them.

    Returns
    -------
    dict
        The fields of a `Sample`.
    """
    sizes = dict.fromkeys(MEMORY, 0.0)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            info, command = process.memory_info(), " ".join(process.cmdline())
            sizes["total"] += info.rss / _MIB
            if "ray::ClientAppActor" in command:
                sizes["clients"] += info.rss / _MIB
            elif "flwr-simulation" in command:
                sizes["server"] += info.rss / _MIB
                sizes["server_own"] += (info.rss - getattr(info, "shared", 0)) / _MIB
    return sizes


def report(
    transport: str,
    records: list[dict[str, Any]],
    samples: list[Sample],
    summary: dict[str, Any],
) -> dict[str, Any]:
    """Put a run's records and samples into figures.

    Parameters
    ----------
    transport : str
        stream or messages.
    records : list of dict
        Of `metrics.jsonl`.
    samples : list of Sample
        Taken meanwhile.
    summary : dict
        Of `summary.json`.

    Returns
    -------
    dict
        A row for every round, named after the transport, and figures on the whole run.
    """
    rounds = [record for record in records if record["kind"] == "round"]
    result: dict[str, Any] = {}
    rows: dict[int, dict[str, Any]] = {}
    for record in rounds:
        number = record["round"]
        during = [sample for sample in samples if sample.round == number]
        rows[number] = {
            **{f"{name}_mib": _median([getattr(s, name) for s in during]) for name in MEMORY},
            "seconds": round(record["seconds"], 2),
            "tokens": record["tokens"],
            "messages": messages(transport, record, records),
            "answered": len(record["clients"]),
            "missing": len(record["missing"]),
        }
        result[f"{transport} round {number}"] = rows[number]
    taken = [record for record in records if record["kind"] == "step"]
    last = max(rows)
    for name in MEMORY:
        grown = rows[last][f"{name}_mib"] - rows[2][f"{name}_mib"]
        result[f"{transport}_{name}_growth_mib_per_round"] = round(grown / (last - 2), 3)
    result[f"{transport}_first_seconds"] = rows[0]["seconds"] if 0 in rows else None
    result[f"{transport}_seconds_per_round"] = _median(
        [row["seconds"] for number, row in rows.items() if number > 0]
    )
    result[f"{transport}_bytes_per_step"] = round(
        sum(step["bytes_up"] + step["bytes_down"] for step in taken) / len(taken)
    )
    result[f"{transport}_status"] = summary["status"]
    result[f"{transport}_loss"] = (
        f"{summary['eval_loss_first']:.3f} -> {summary['eval_loss_last']:.3f}"
    )
    return result


def messages(transport: str, record: dict[str, Any], records: list[dict[str, Any]]) -> int:
    """Return how many messages a round took to its clients; each has one back.

    Parameters
    ----------
    transport : str
        stream or messages.
    record : dict
        The round's.
    records : list of dict
        All of the run.

    Returns
    -------
    int
        Over the stream one for each client that trains or evaluates. Over messages two for every
        step, and two more to begin and to end; an evaluation of up to eight batches takes two.
    """
    trained = len(record["clients"]) if record["train"] else 0
    evaluated = len((record.get("evaluation") or record)["clients"]) if record["evaluate"] else 0
    if transport == "stream":
        return trained + evaluated
    number = record["round"]
    steps = sum(r["kind"] == "step" and r["round"] == number for r in records)
    return 2 * steps + 2 * trained + 2 * evaluated


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 2) if values else float("nan")
