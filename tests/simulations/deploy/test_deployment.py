"""Deployments: credentials that verify, processes that end, and the app under real SuperNodes."""

from __future__ import annotations

import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from simulations.deploy.credentials import make_node_key, make_server_credentials
from simulations.deploy.demo import NODES, deployment_demo
from simulations.deploy.deployment import deployment, write_data
from simulations.deploy.intruders import Intruder, send_intruders
from simulations.launch.local_flower import worth_reading
from simulations.launch.processes import Started, free_ports, stopping, wait_until

SLEEPER = "import subprocess, sys, time; {}; print('up', flush=True); time.sleep(600)"
CHILD = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"


def _sleeper(folder: Path, name: str, first: str = "pass") -> Started:
    started = Started(
        name,
        [sys.executable, "-c", SLEEPER.format(first)],
        env=os.environ,
        log=folder / f"{name}.log",
        cwd=folder,
    )
    wait_until(lambda: "up" in started.tail(), seconds=30, what=name, process=started)
    return started


def test_stops_what_it_started_and_nothing_else(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with pytest.raises(KeyboardInterrupt), stopping() as started:
            started.append(_sleeper(tmp_path, "plain"))
            started.append(_sleeper(tmp_path, "parent", CHILD))
            stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
            started.append(
                _sleeper(tmp_path, "child", CHILD.replace("import", stubborn + "; import"))
            )
            family = [psutil.Process(each.process.pid) for each in started]
            family += [child for one in family for child in one.children(recursive=True)]
            assert len(family) == 5
            raise KeyboardInterrupt
        assert not any(_alive(process) for process in family)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_termination_signal_unwinds_too(tmp_path: Path) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ending, stopping() as started:
        started.append(_sleeper(tmp_path, "plain"))
        timer.start()
        time.sleep(30)
    assert ending.value.code == 128 + signal.SIGTERM
    assert not started[0].running


def test_waiting_ends_with_the_words_of_the_process(tmp_path: Path) -> None:
    dying = Started(
        "the SuperLink",
        [sys.executable, "-c", "raise SystemExit('port is taken')"],
        env=os.environ,
        log=tmp_path / "log",
        cwd=tmp_path,
    )
    with pytest.raises(RuntimeError, match=r"the SuperLink ended with exit code 1 .*\n.*taken"):
        wait_until(lambda: False, seconds=30, what="it to answer", process=dying)
    with pytest.raises(RuntimeError, match="waited 0 s for nothing"):
        wait_until(lambda: False, seconds=0, what="nothing")


def test_credentials_verify_and_keep_their_secrets(tmp_path: Path) -> None:
    files = make_server_credentials(tmp_path)
    private, public = make_node_key(tmp_path, "node")
    for secret in (files.key, private):
        assert secret.stat().st_mode & 0o077 == 0
    assert public.read_bytes().startswith(b"ecdsa-sha2-nistp384 ")
    assert b"OPENSSH PRIVATE KEY" in private.read_bytes()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=str(files.ca))
    assert _handshake(server, client, "127.0.0.1")
    assert _handshake(server, client, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server, client, "elsewhere.example")


def test_a_certificate_names_the_addresses_it_was_made_for(tmp_path: Path) -> None:
    files = make_server_credentials(tmp_path, ["10.77.0.1"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=str(files.ca))
    assert _handshake(server, client, "10.77.0.1")
    with pytest.raises(ssl.SSLCertVerificationError):
        _handshake(server, client, "127.0.0.1")


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    files, other = make_server_credentials(ours), make_server_credentials(theirs)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=str(other.ca))
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        _handshake(server, client, "localhost")


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    """Do a TLS handshake in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname=name),
        server.wrap_bio(up, down, server_side=True),
    ]
    done = [False, False]
    for turn in range(20):
        end = turn % 2
        try:
            ends[end].do_handshake()
            done[end] = True
        except ssl.SSLWantReadError:
            continue
        if all(done):
            return True
    return False


def test_each_node_has_text_of_its_own(tmp_path: Path) -> None:
    first, second = write_data(tmp_path, NODES)
    ours = {json.loads(line)["text"] for line in first.read_text().splitlines()}
    theirs = {json.loads(line)["text"] for line in second.read_text().splitlines()}
    assert min(len(ours), len(theirs)) > 20
    assert not ours & theirs


def test_free_ports_are_different() -> None:
    assert len(set(free_ports(20))) == 20


def test_console_leaves_out_housekeeping() -> None:
    kept = ["run folder: x", "round 1/3 | loss 1", "ERROR :     boom", "ValueError: no"]
    dropped = ["INFO :      uv sync took 0.1 seconds.", "WARNING :   Since flwr 1.32", "  ", ""]
    assert [line for line in kept + dropped if worth_reading(line)] == kept


@pytest.mark.parametrize(
    ("ending", "seconds", "complaint"),
    [
        ("raise SystemExit('wrong key')", 30, ""),
        ("raise SystemExit('no disk')", 30, "not refused.*exit code 1 and without 'wrong key'.*"),
        ("print('wrong key')", 30, "not refused.*exit code 0"),
        ("time.sleep(600)", 0, "waited 0 s for someone to be refused"),
    ],
)
def test_an_intruder_that_is_not_refused_is_an_error(
    tmp_path: Path, ending: str, seconds: int, complaint: str
) -> None:
    command = [sys.executable, "-c", f"import time; {ending}"]
    with stopping() as started:
        node = Started("node", command, env=os.environ, log=tmp_path / "log", cwd=tmp_path)
        started.append(node)
        intruder = Intruder(who="someone", node=node, expected="wrong key")
        if complaint:
            with pytest.raises(RuntimeError, match=complaint):
                intruder.refusal(seconds=seconds)
        else:
            assert intruder.refusal(seconds=seconds) == "wrong key"


@pytest.mark.slow
def test_app_runs_under_real_supernodes_with_tls_and_keys() -> None:
    said: list[str] = []
    folder = deployment_demo(overrides="train.rounds=1 train.local_steps=5", say=said.append)
    refused = [line for line in said if line.startswith("refused: ")]
    assert re.search("key is not registered: .*Failed to activate SuperNode", refused[0])
    assert re.search("another authority signed: .*CERTIFICATE_VERIFY_FAILED", refused[1])
    for line, what in zip(refused[2:], ("SuperLink's database", "replayed"), strict=True):
        assert re.search(f"{what}: no session is open to this token", line)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["clients"] == len(NODES)
    assert summary["eval_loss_last"] < summary["eval_loss_first"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {record["client"] for record in records if record["kind"] == "step"} == set(NODES)


@pytest.mark.slow
def test_only_known_supernodes_that_trust_the_superlink_get_in() -> None:
    with deployment() as site:
        data = write_data(site.folder, NODES)
        site.add_node("known", data[0])
        plain = replace(site, tls=None).add_node("plain", data[1])
        intruders = send_intruders(site, data[1])
        wait_until(lambda: site.online() >= 1, seconds=90, what="the known SuperNode")
        for intruder in intruders:
            assert intruder.expected in intruder.refusal()
        assert site.online() == 1
        assert "SuperNode ID" in site.started[1].tail(40)
        assert "SuperNode ID" not in plain.tail(200)
