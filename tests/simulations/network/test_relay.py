"""The relay: late by as much as it should be, no faster than it may be, and true to the byte.

Times are bounded from below only: how late a busy machine makes things is not the relay's to say.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from multiprocessing import Pipe

import pytest

from conf.rules import split_address
from conf.schema import TrainConfig
from flower_app.client import streamed
from models import split
from simulations.launch.processes import free_ports
from simulations.network.relay import Network, Relay, serve
from tests.simulations.network.conftest import address
from tests.strategies.helpers import (
    CUT,
    open_engine,
    place,
    random_steps,
    served,
    tiny_model,
)
from tests.strategies.helpers import connect as connect_link


def connect(relay: Relay) -> socket.socket:
    client = socket.create_connection(split_address(relay.address), timeout=10)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def accept(server: socket.socket) -> socket.socket:
    accepted, _ = server.accept()
    accepted.settimeout(10)
    return accepted


def read(client: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return bytes(data)


@pytest.mark.parametrize(
    "network",
    [Network(), Network(rtt=0.004, bandwidth=400e6, jitter=0.003)],
    ids=["as it is", "slow"],
)
def test_every_byte_arrives_once_and_in_order(echo: str, network: Network) -> None:
    data = os.urandom(2_000_000)
    with Relay(echo, network) as relay, connect(relay) as client:
        threading.Thread(target=client.sendall, args=(data,), daemon=True).start()
        assert read(client, len(data)) == data
        assert (relay.bytes_up, relay.bytes_down) == (len(data), len(data))


def test_an_answer_takes_a_round_trip(echo: str) -> None:
    with Relay(echo, Network(rtt=0.05)) as relay, connect(relay) as client:
        started = time.monotonic()
        for _ in range(3):
            client.sendall(b"x")
            assert read(client, 1) == b"x"
        assert time.monotonic() - started >= 3 * 0.05


def test_what_is_sent_at_once_travels_together(echo: str) -> None:
    """Latency is waited for once, not for each piece: half a megabyte is 500 pieces here."""
    network = Network(rtt=0.1, bandwidth=80e6)
    with Relay(echo, network) as relay, connect(relay) as client:
        data, started = bytes(500_000), time.monotonic()
        client.sendall(data)
        read(client, len(data))
        took = time.monotonic() - started
    assert took >= 0.1 + 0.05  # both ways at once: the second way's bytes follow the first's
    assert took < 500 * 0.1 / 2


def test_connections_share_the_bandwidth(server: socket.socket) -> None:
    with Relay(address(server), Network(bandwidth=8e6)) as relay:
        started = time.monotonic()
        clients = [connect(relay) for _ in range(2)]
        accepted = [accept(server) for _ in clients]
        for client in clients:
            client.sendall(bytes(100_000))
        for each in accepted:
            assert len(read(each, 100_000)) == 100_000
        assert time.monotonic() - started >= 200_000 / 1e6
        for each in (*clients, *accepted):
            each.close()


def test_a_full_network_makes_the_sender_wait(server: socket.socket) -> None:
    """Nobody reads, so no more goes in than the link, its queue and the kernel's buffers hold."""
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # accepted sockets inherit it
    with Relay(address(server), Network(rtt=0.1, bandwidth=8e7)) as relay:
        client = connect(relay)
        accepted = accept(server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        client.setblocking(False)
        sent, waited = 0, 0
        while waited < 20 and sent < 3e6:
            try:
                sent += client.send(bytes(2**16))
                waited = 0
            except BlockingIOError:
                waited += 1
                time.sleep(0.02)
        assert relay.bytes_up < sent < 3e6
        client.close()
        accepted.close()


def test_the_last_word_of_one_side_leaves_the_other_its_own(server: socket.socket) -> None:
    with Relay(address(server), Network(rtt=0.01)) as relay, connect(relay) as client:
        accepted = accept(server)
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read(accepted, 100) == b"question"
        accepted.sendall(b"answer")
        accepted.close()
        assert read(client, 100) == b"answer"


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_side_that_breaks_ends_the_other(server: socket.socket, side: str) -> None:
    with Relay(address(server), Network(rtt=0.01)) as relay:
        client = connect(relay)
        accepted = accept(server)
        breaks, stays = (client, accepted) if side == "client" else (accepted, client)
        breaks.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        breaks.close()  # a reset
        assert ends(stays)
        stays.close()


def test_a_relay_severs_its_connections_and_takes_new_ones(echo: str) -> None:
    with Relay(echo, Network(rtt=0.01)) as relay:
        first = connect(relay)
        first.sendall(b"x")
        assert read(first, 1) == b"x"
        relay.sever()
        assert ends(first)
        first.close()
        connect(relay).close()


def test_where_nobody_listens_a_connection_ends(server: socket.socket) -> None:
    nobody = address(server)
    server.close()
    with Relay(nobody, Network()) as relay, connect(relay) as client:
        assert ends(client)


def ends(stays: socket.socket) -> bool:
    try:
        return stays.recv(100) == b"" or stays.recv(100) == b""
    except ConnectionError:
        return True


def test_a_relay_in_its_own_process_says_where_it_is_and_what_passed(echo: str) -> None:
    here, there = Pipe()
    thread = threading.Thread(target=serve, args=(there, echo, Network()))
    thread.start()
    with socket.create_connection(split_address(here.recv()), timeout=10) as client:
        client.sendall(b"abc")
        assert read(client, 3) == b"abc"
        here.send(None)
        assert here.recv() == (3, 3)
    here.close()
    thread.join(10)
    assert not thread.is_alive()


def test_training_through_a_relay_gives_the_same_numbers(one_thread: None) -> None:
    """`link.advertise` names the relay, and it alone: `link.bind` is where it passes on to."""
    bind = f"127.0.0.1:{free_ports(1)[0]}"
    with Relay(bind, Network(rtt=0.004)) as relay:
        through = trained(bind=bind, advertise=relay.address)
        assert relay.bytes_up > 10_000
    assert through == trained()


def trained(**link: object) -> list[float]:
    """Losses of two steps of two micro-batches; the last depends on every gradient before it."""
    train = TrainConfig(accumulate=2)
    engine = open_engine(accumulate=2)
    parts = split(tiny_model(), CUT)
    with served(engine, **link) as service:
        connection = connect_link(service, "a", steps=2)
        steps = random_steps(2, seed=0, accumulate=2)
        found = streamed.train(parts.bottom, parts.top, connection, steps, 2, train, place())
        connection.close()
    return found.losses
