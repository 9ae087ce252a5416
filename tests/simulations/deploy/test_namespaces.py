"""SuperLink, trunk and SuperNodes on hosts of their own, and links that break in mid-round."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from simulations.deploy.deployment import EXPERIMENT, Deployment, deployment, write_data
from simulations.deploy.netns import Network, network, why_not
from simulations.launch.local_flower import Outcome
from simulations.launch.processes import Place, Started, wait_until
from tests.simulations.launch.watched import Watched

SITES = ("alder", "birch")
HOSTS = ("superlink", "trunk", *SITES)
ROUNDS, STEPS = 2, 250
SHORT_CUT, LONG_CUT = 5.0, 15.0
"""Seconds: one that TCP bridges, and one after which the link is known for broken. Both are shorter
than what a client may be out of reach."""

WHY_NOT = why_not()
needs_namespaces = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 5000))
print("up", flush=True)
connection, _ = server.accept()
while data := connection.recv(100):
    connection.sendall(data)
"""
CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000))
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.recv(100).decode(), end="", flush=True)
"""


@needs_namespaces
def test_a_cut_swallows_packets_and_a_delay_holds_them_back() -> None:
    with network(["near", "far"]) as net, _echo(net) as ask:
        ask()
        assert ask() < 0.05
        net.delay("far", 0.06)
        assert 0.12 <= ask() < 0.5
        net.delay("far", 0.0)
        net.cut("far")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask)
            time.sleep(1.0)
            assert not answer.done()  # neither an answer nor an error
            net.restore("far")
            assert 1.0 <= answer.result(timeout=30) < 10
        assert ask() < 0.05


@needs_namespaces
def test_nothing_is_left_of_a_network() -> None:
    with pytest.raises(KeyError), network(["one", "two"]) as net:
        namespaces = {host.namespace for host in net.hosts.values()}
        assert len(namespaces & _namespaces()) == 2
        with pytest.raises(ValueError, match="no host 'three' in this network: one, two"):
            net.cut("three")
        raise KeyError
    assert not namespaces & _namespaces()


def test_says_why_there_can_be_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.deploy.netns.os.geteuid", lambda: 1000)
    monkeypatch.setattr("simulations.deploy.netns.shutil.which", lambda name: f"/sbin/{name}")
    assert "only root" in why_not()
    monkeypatch.setattr("simulations.deploy.netns.shutil.which", lambda name: None)
    assert "iproute2" in why_not()
    with pytest.raises(RuntimeError, match="no network namespaces here: there is no `ip`"):
        network(["one"]).__enter__()


def _namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines()}


@contextlib.contextmanager
def _echo(net: Network) -> Iterator[Callable[[], float]]:
    """Yield what sends a line from `near` to `far` and back, and returns the seconds it took."""
    with contextlib.ExitStack() as stack:
        server = _piped(stack, [*net.within("far"), sys.executable, "-c", SERVER])
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        client = _piped(
            stack, [*net.within("near"), sys.executable, "-c", CLIENT, net.address("far")]
        )
        assert client.stdin is not None
        assert client.stdout is not None
        to_client, from_client = client.stdin, client.stdout

        def ask() -> float:
            begun = time.monotonic()
            to_client.write("hello\n")
            to_client.flush()
            assert from_client.readline() == "hello\n"
            return time.monotonic() - begun

        yield ask


def _piped(stack: contextlib.ExitStack, command: list[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=dict(os.environ))
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


Disturbance = Callable[[Network, Watched], None]


def _run(
    overrides: str, disturb: Disturbance | None = None, logs: dict[str, str] | None = None
) -> tuple[Outcome, Watched]:
    """Lay out the four hosts, run, and disturb the links once round 1 has taken some steps.

    What the SuperNodes printed goes to `logs`, by site.
    """
    watched = Watched()
    with network(HOSTS) as net, ThreadPoolExecutor(1) as pool:
        at = {name: Place(address=net.address(name), within=net.within(name)) for name in HOSTS}
        with deployment(at=at["superlink"], trunk=at["trunk"]) as site:
            nodes = _add_sites(site, at)
            address = f"{at['trunk'].address}:9393"
            link = f"link.bind=0.0.0.0:9393 link.advertise={address} output.save_model=false"
            run = pool.submit(site.flower.run, EXPERIMENT, f"{link} {overrides}", echo=watched)
            try:
                wait_until(
                    lambda: run.done() or min(map(watched.steps, SITES)) >= 20,
                    seconds=300,
                    what="the first steps",
                )
                assert not run.done(), run.result().explain() + site.explain()
                if disturb is not None:
                    disturb(net, watched)
                outcome = run.result(timeout=400)
            except BaseException:
                print(site.explain())
                raise
            finally:
                for name in SITES:  # else the SuperNodes try in vain to say good-bye
                    net.restore(name)
            assert all(node.running for node in nodes), site.explain()
            if logs is not None:
                logs |= {name: node.tail(10_000) for name, node in zip(SITES, nodes, strict=True)}
    return outcome, watched


def _add_sites(site: Deployment, at: dict[str, Place]) -> list[Started]:
    data = write_data(site.folder, SITES)
    nodes = [site.add_node(name, path, at=at[name]) for name, path in zip(SITES, data, strict=True)]
    wait_until(lambda: site.online() == len(SITES), seconds=120, what="the SuperNodes")
    return nodes


def _losses(watched: Watched) -> list[Any]:
    """Every loss of a run: of each step of each client, and of each round."""
    steps = sorted(
        (one["client"], one["round"], one["step"], one["loss"], one["grad_norm"])
        for one in watched.records("step")
    )
    assert len(steps) == len(SITES) * ROUNDS * STEPS
    return [*steps, *((one["train"], one["evaluate"]) for one in watched.records("round"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The losses of a run that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_HOME", str(tmp_path_factory.mktemp("undisturbed")))
        return _undisturbed()


def _undisturbed() -> list[Any]:
    outcome, watched = _run(f"train.rounds={ROUNDS} train.local_steps={STEPS}")
    assert outcome.completed, outcome.explain()
    assert [one["clients"] for one in watched.records("round")[1:]] == [sorted(SITES)] * ROUNDS
    return _losses(watched)


@needs_namespaces
@pytest.mark.slow
def test_cuts_and_a_slow_link_change_no_number(undisturbed: list[Any]) -> None:
    def disturb(net: Network, watched: Watched) -> None:
        net.delay("birch", 0.05)
        _cut_for_a_while(net, watched, "alder", round_number=1, seconds=SHORT_CUT)
        net.delay("birch", 0.0)
        _cut_for_a_while(net, watched, "birch", round_number=2, seconds=LONG_CUT)

    logs: dict[str, str] = {}
    outcome, watched = _run(f"train.rounds={ROUNDS} train.local_steps={STEPS}", disturb, logs)
    assert outcome.completed, outcome.explain()
    assert "connecting again" in logs["birch"], "the long cut broke no stream"
    for record in watched.records("round")[1:]:
        assert record["clients"] == sorted(SITES)
        assert not record.get("missing")
    assert not outcome.summary().get("dropped")
    assert _losses(watched) == undisturbed


def _cut_for_a_while(
    net: Network, watched: Watched, site: str, *, round_number: int, seconds: float
) -> None:
    """Cut a site off in the middle of a round, and let it come back."""
    wait_until(
        lambda: watched.steps(site, round_number) >= 20,
        seconds=200,
        what=f"{site}'s steps of round {round_number}",
    )
    net.cut(site)
    time.sleep(1.0)  # what had arrived is recorded
    before = watched.steps(site, round_number)
    time.sleep(seconds - 1.0)
    assert watched.steps(site, round_number) == before < STEPS
    net.restore(site)


@needs_namespaces
@pytest.mark.slow
def test_a_round_ends_without_a_site_that_stays_cut_off() -> None:
    ended: list[float] = []

    def disturb(net: Network, watched: Watched) -> None:
        net.cut("birch")
        begun = time.monotonic()
        wait_until(lambda: len(watched.records("round")) > 1, seconds=120, what="the round's end")
        ended.append(time.monotonic() - begun)

    outcome, watched = _run(
        f"train.rounds={ROUNDS} train.local_steps={STEPS} federation.min_clients=1 "
        "link.grace=6 link.timeout=12",
        disturb,
    )
    assert outcome.completed, outcome.explain()
    first = watched.records("round")[1]
    assert first["asked"] == sorted(SITES)
    assert first["clients"] == ["alder"]
    assert re.search(r"after step \d+ of 250", first["missing"]["birch"])
    assert ended[0] < 90
    assert outcome.summary()["dropped"]["birch"] >= 1
