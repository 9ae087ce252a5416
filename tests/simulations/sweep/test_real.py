"""Sweeps under real Flower: twelve points, two of them crash; killed in the middle, gone on with.

Each takes minutes; what they print goes to files beside the sweep's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas
import psutil
import pytest

from flower_app.runs.folders import runs_folder
from simulations.deploy.demo import NODES
from simulations.deploy.deployment import deployment, write_data
from simulations.launch.processes import program, wait_until
from simulations.sweep.state import (
    CRASHED,
    FILE,
    FINISHED,
    RUNNING,
    Sweep,
    read_sweep,
    sweeps_folder,
)

TINY = """
fixed:
  model.scratch.hidden_size: 16
  model.scratch.intermediate_size: 32
  model.scratch.num_hidden_layers: 4
  data.context: 16
  data.max_examples: 20
  train.rounds: {rounds}
  train.local_steps: 3
  train.batch_size: 2
  output.save_model: false
  {more}
grid:
  train.lr: [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
seeds: [0, 1]
include:
  - {{link.tls: on, link.certificate: {file}, link.key: {file}}}   # no PEM file: crashes
"""
CRASHING = ["006", "012"]


def _write(folder: Path, experiment: str, *, rounds: int, more: str = "") -> Path:
    path, file = folder / "twelve.yaml", folder / "no.pem"
    file.write_text("nothing\n")
    path.write_text(
        f"experiment: {experiment}\n" + TINY.format(rounds=rounds, more=more, file=file)
    )
    return path


@contextlib.contextmanager
def _graft(*arguments: str, env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`graft sweep`, which ends with the context if it has not by then."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program("graft"), "sweep", *arguments], env=dict(env), stdout=output,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(120)


def _kill_in_the_middle(graft: subprocess.Popen[bytes], *, after: int) -> tuple[Path, Sweep]:
    """Kill it when so many points are finished and another is being trained; returns the state."""

    def in_the_middle() -> bool:
        assert graft.poll() is None, "the sweep ended before it was killed"
        for path in sweeps_folder().glob(f"*/{FILE}"):
            state = read_sweep(path.parent)
            under_way = [p for p in state.points if p.status == RUNNING and p.run]
            if state.count(FINISHED) >= after and under_way:
                return True
        return False

    wait_until(in_the_middle, seconds=1500, what="the middle of the sweep")
    graft.send_signal(signal.SIGKILL)
    graft.wait()
    (folder,) = sweeps_folder().iterdir()
    return folder, read_sweep(folder)


def _check_table(folder: Path, before: Sweep, *, rounds: int, clients: int) -> None:
    done = read_sweep(folder)
    assert [point.id for point in done.points if point.status == CRASHED] == CRASHING
    assert done.count(FINISHED) == 10
    for old, new in zip(before.points, done.points, strict=True):
        if old.status == FINISHED:
            assert new == old  # not run again
    for point in done.points:
        if point.status == CRASHED:
            assert "link.certificate holds no PEM certificate" in point.error
            assert (folder / "logs" / f"{point.id}.log").stat().st_size > 1000
        else:
            summary = json.loads((Path(point.run) / "summary.json").read_text())
            assert (summary["status"], summary["rounds"]) == ("finished", rounds)
    rows = pandas.read_parquet(folder / "results.parquet")
    finished = rows[rows["status"] == FINISHED]
    assert len(finished) == 10 * (rounds + 1)
    assert set(finished["clients"]) == {clients}
    assert finished["eval_loss"].notna().all()
    assert "10 of 12 points finished" in (folder / "table.md").read_text()
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_sweep_goes_on_in_a_simulation(tmp_path: Path) -> None:
    path = _write(tmp_path, "demo", rounds=2)
    with _graft(str(path), env=os.environ, log=tmp_path / "first.log") as graft:
        folder, before = _kill_in_the_middle(graft, after=2)
    wait_until(lambda: not _left_over(), seconds=60, what="the watcher to end what was left")
    log = tmp_path / "second.log"
    with _graft("--resume", folder.name, env=os.environ, log=log) as again:
        assert again.wait(3000) == 1, log.read_text()  # for two points crashed
    _check_table(folder, before, rounds=2, clients=2)
    assert all(point.peak_mb > 500 for point in read_sweep(folder).points)
    assert not _left_over()


def _left_over() -> list[psutil.Process]:
    """Processes of this test's Graft home, this one aside."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("GRAFT_HOME") == str(runs_folder().parent)
        except (psutil.Error, OSError):
            continue
        if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_sweep_goes_on_at_a_superlink(tmp_path: Path) -> None:
    path = _write(tmp_path, "deployment", rounds=1, more="link.tls: off")
    with deployment(insecure=True) as site:
        for name, data in zip(NODES, write_data(site.folder, NODES), strict=True):
            site.add_node(name, data)
        wait_until(lambda: site.online() == len(NODES), seconds=120, what="the SuperNodes")
        env = os.environ | {"FLWR_HOME": str(site.flower.home)}
        where = ("--superlink", site.flower.superlink, "--jobs", "2")
        with _graft(str(path), *where, env=env, log=tmp_path / "first.log") as graft:
            folder, before = _kill_in_the_middle(graft, after=2)
        under_way = [point for point in before.points if point.status == RUNNING and point.run]
        time.sleep(1.0)
        log = tmp_path / "second.log"
        with _graft("--resume", folder.name, "--jobs", "2", env=env, log=log) as again:
            assert again.wait(3000) == 1, log.read_text()
        _check_table(folder, before, rounds=1, clients=2)
        # They went on by themselves at the SuperLink, and were waited for.
        after = {point.id: point for point in read_sweep(folder).points}
        assert all(after[point.id].run_id == point.run_id for point in under_way)
