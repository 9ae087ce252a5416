"""kill -9 of the ServerApp's process, with real processes: the resumed run equals the whole one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from simulations.deploy.demo import NODES
from simulations.deploy.deployment import EXPERIMENT, deployment, write_data
from simulations.launch.local_flower import LocalFlower, Outcome, local_superlink
from simulations.launch.processes import wait_until
from simulations.launch.run import RAY_LATE
from tests.flower_app.runs.test_resume import assert_equal_runs, records
from tests.flower_app.test_app import TINY

SHORT = (
    "train.rounds=4 train.local_steps=20 train.batch_size=4 train.schedule=cosine "
    "data.max_examples=24 data.context=32 output.log_every=100"
)
POLICIES = ["splitfed-v1", "splitfed-v2 train.turns=ordered"]


def serverapps(under: int) -> list[psutil.Process]:
    """The processes that a ServerApp and its service run in, below a SuperLink."""
    found = []
    for process in psutil.Process(under).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = " ".join(process.cmdline())
            if "flwr-serverapp" in line or "flwr-simulation" in line:
                found.append(process)
    return found


def metrics(folder: Path) -> str:
    """What is in `metrics.jsonl`; nothing if it is not there yet."""
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def kill_in_round_two(superlink: int, folder: Callable[[], Path | None]) -> list[int]:
    """Wait for a step of round 2 and kill the ServerApp; returns the rounds that were over."""

    def in_round_two() -> bool:
        path = folder()
        return path is not None and '"kind": "step", "round": 2' in metrics(path)

    wait_until(lambda: folder() is not None, seconds=300, what="the run folder")
    victims = serverapps(superlink)  # sought before, for the round is short
    assert victims, [p.cmdline() for p in psutil.Process(superlink).children(recursive=True)]
    end = time.monotonic() + 300
    while not in_round_two():
        assert time.monotonic() < end, "no step of round 2 came"
        time.sleep(0.01)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims, timeout=20)
    path = folder()
    assert path is not None
    return [r["round"] for r in records(path) if r["kind"] == "round"]


class Folder:
    """Learns the run folder from the run's output."""

    def __init__(self) -> None:
        self.path: Path | None = None

    def __call__(self, line: str) -> None:
        if line.startswith("run folder: "):
            self.path = Path(line.removeprefix("run folder: "))


def broken_and_resumed(flower: LocalFlower, superlink: int, run: Callable[..., Outcome]) -> Path:
    """Start a run, kill its ServerApp in round 2, and resume it; the run folder."""
    folder = Folder()
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(run, echo=folder)
        done = kill_in_round_two(superlink, lambda: folder.path)
        assert not going.result(timeout=120).completed
    assert done == [0, 1]
    assert folder.path is not None
    outcome = run(resume=str(folder.path))
    if any(RAY_LATE in line for line in outcome.lines):  # those of the killed one are in its way
        outcome = run(resume=str(folder.path))
    assert outcome.completed, "\n".join(outcome.lines)
    assert outcome.folder == folder.path
    assert {r["round"] for r in records(folder.path) if r["kind"] == "resume"} == {1}
    assert outcome.summary()["rounds"] == 4
    return folder.path


def superlink_of(flower: LocalFlower) -> int:
    """The process id of the SuperLink whose home this is."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if str(flower.home / "state.db") in process.cmdline():
                return process.pid
    raise AssertionError("no SuperLink")


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_in_simulation(policy: str) -> None:
    overrides = f"{TINY} {SHORT} train.strategy={policy} data.partitioner=iid"
    together = "client-resources-num-cpus=1 init-args-num-cpus=2" if "ordered" in policy else ""

    with local_superlink() as flower:

        def run(**more: str) -> Outcome:
            given = "" if "resume" in more else overrides
            return flower.run("demo", given, federation=together, **more)  # type: ignore[arg-type]

        smooth = run()
        broken = broken_and_resumed(flower, superlink_of(flower), run)

    assert smooth.folder is not None
    assert_equal_runs(broken, smooth.folder)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_in_deployment(policy: str) -> None:
    overrides = f"{SHORT} train.strategy={policy} link.tls=off"

    with deployment(insecure=True) as site:
        for name, path in zip(NODES, write_data(site.folder, NODES), strict=True):
            site.add_node(name, path)
        wait_until(lambda: site.online() == len(NODES), seconds=120, what="the SuperNodes")

        def run(**more: str) -> Outcome:
            given = "" if "resume" in more else overrides
            return site.flower.run(EXPERIMENT, given, **more)  # type: ignore[arg-type]

        smooth = run()
        assert smooth.completed, smooth.explain()
        broken = broken_and_resumed(site.flower, superlink_of(site.flower), run)

    assert smooth.folder is not None
    assert_equal_runs(broken, smooth.folder)
