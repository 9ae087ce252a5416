"""A SuperNode is killed in the middle of a round: the others finish it, and the record says so."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from simulations.deploy.deployment import EXPERIMENT, deployment, write_data
from simulations.launch.local_flower import Outcome
from simulations.launch.processes import wait_until
from tests.simulations.launch.watched import Watched

NAMES = ("alder", "birch", "cedar", "dogwood")
VICTIM = "cedar"
OTHERS = sorted(set(NAMES) - {VICTIM})


def _run_and_kill(overrides: str, *, after: int) -> tuple[Outcome, Watched]:
    """Deploy four SuperNodes, run, and cut one off after some steps of its round 1."""
    watched = Watched()
    with deployment(insecure=True) as site, ThreadPoolExecutor(1) as pool:
        data = write_data(site.folder, NAMES)
        nodes = {name: site.add_node(name, path) for name, path in zip(NAMES, data, strict=True)}
        wait_until(lambda: site.online() == len(NAMES), seconds=120, what="the SuperNodes")
        run = pool.submit(site.flower.run, EXPERIMENT, f"link.tls=off {overrides}", echo=watched)
        wait_until(
            lambda: run.done() or watched.steps(VICTIM) >= after,
            seconds=300,
            what="the victim's steps",
        )
        assert not run.done(), run.result().explain()
        family = psutil.Process().children(recursive=True)
        site.cut_off(nodes[VICTIM])
        outcome = run.result(timeout=540)
        family += psutil.Process().children(recursive=True)
    assert not [process for process in family if _alive(process)]
    return outcome, watched


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _check_others_went_on(outcome: Outcome, watched: Watched, reason: str) -> None:
    assert outcome.completed, outcome.explain()
    rounds = {record["round"]: record for record in watched.records("round")}
    assert rounds[0]["clients"] == sorted(NAMES)
    assert rounds[1]["asked"] == sorted(NAMES)
    assert rounds[1]["clients"] == OTHERS
    assert set(rounds[1]["missing"]) == {VICTIM}
    assert re.search(reason, rounds[1]["missing"][VICTIM])
    for number in range(2, len(rounds)):
        assert rounds[number]["clients"] == OTHERS
    summary = outcome.summary()
    assert summary["dropped"][VICTIM] >= 1
    assert summary["eval_loss_last"] < summary["eval_loss_first"] - 0.5


@pytest.mark.slow
def test_a_round_ends_with_its_quorum_when_a_supernode_is_killed() -> None:
    # Three are the fewest that a round waits for; all four are there when it begins.
    outcome, watched = _run_and_kill(
        "train.rounds=3 train.local_steps=300 federation.min_clients=3 federation.quorum=0.75 "
        "link.grace=3 output.save_model=false output.log_every=1000",
        after=10,
    )
    _check_others_went_on(
        outcome, watched, r"its stream broke after step \d+ of 300 and no answer came within"
    )
