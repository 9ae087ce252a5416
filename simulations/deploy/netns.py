"""Hosts of a small network on this machine: a network namespace each, and a switch between them.

The switch is a thread of this process: every host's `eth0` is a TAP device whose frames it passes
on, late or not at all. A cut is therefore what a cable pulled behind a router is: packets vanish
and no socket is told. Neither bridge, netem nor nftables is asked of the kernel; many lack them.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TUN = Path("/dev/net/tun")
SUBNET = "10.77.0"
MTU = 9000
"""Large, for the switch is Python: fewer frames cost less of the processor that trains."""

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_MAC = b"\x02graf"  # locally administered; the last byte is the host's


@dataclass(kw_only=True)
class Host:
    """A namespace of the network, and the state of its link."""

    name: str
    namespace: str
    address: str
    device: int
    """The switch's end of the link: a file descriptor that gives and takes Ethernet frames."""
    up: bool = True
    delay: float = 0.0


@dataclass(kw_only=True)
class Network:
    """Hosts that reach each other and nothing else."""

    hosts: dict[str, Host]
    _held: list[tuple[float, int, Host, Host, bytes]] = field(default_factory=list)
    """Frames on their way: when they are due, their order, from, to, content."""
    _order: Iterator[int] = field(default_factory=itertools.count)
    _stop: threading.Event = field(default_factory=threading.Event)

    def address(self, name: str) -> str:
        """Return a host's IPv4 address."""
        return self._host(name).address

    def within(self, name: str) -> tuple[str, ...]:
        """Return what precedes a command that is to run on a host.

        Parameters
        ----------
        name : str
            The host.

        Returns
        -------
        tuple of str
            Program and arguments. The process that is started becomes the command: its id is the
            command's.
        """
        return ("ip", "netns", "exec", self._host(name).namespace)

    def cut(self, name: str) -> None:
        """Let every packet from and to a host vanish, those on their way too."""
        self._host(name).up = False

    def restore(self, name: str) -> None:
        """Undo `cut`."""
        self._host(name).up = True

    def delay(self, name: str, seconds: float) -> None:
        """Hold back what a host sends and what is sent to it.

        Parameters
        ----------
        name : str
            The host.
        seconds : float
            For how long, in each direction; 0 ends it.
        """
        self._host(name).delay = seconds

    def _host(self, name: str) -> Host:
        if name not in self.hosts:
            raise ValueError(f"no host {name!r} in this network: {', '.join(self.hosts)}")
        return self.hosts[name]

    def _switch(self) -> None:
        """Pass frames on until the network is left."""
        by_device = {host.device: host for host in self.hosts.values()}
        by_mac = {_mac(index): host for index, host in enumerate(self.hosts.values())}
        while not self._stop.is_set():
            due_in = self._held[0][0] - time.monotonic() if self._held else 0.2
            ready, _, _ = select.select(list(by_device), [], [], min(max(due_in, 0.0), 0.2))
            for device in ready:
                for frame in _frames(device):
                    self._hold(by_device[device], by_mac.get(frame[:6]), frame)
            now = time.monotonic()
            while self._held and self._held[0][0] <= now:
                _, _, source, target, frame = heapq.heappop(self._held)
                if source.up and target.up:
                    with contextlib.suppress(OSError):  # a full or vanished device loses a frame
                        os.write(target.device, frame)

    def _hold(self, source: Host, target: Host | None, frame: bytes) -> None:
        if target is None or not (source.up and target.up):  # broadcasts have no use here
            return
        due = time.monotonic() + source.delay + target.delay
        heapq.heappush(self._held, (due, next(self._order), source, target, frame))


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Make a namespace for each host and connect them.

    Parameters
    ----------
    names : sequence of str
        The hosts. Their addresses are 10.77.0.1, 10.77.0.2, ...

    Yields
    ------
    Network
        Namespaces and devices are removed when the context is left, however it is left. End the
        processes in them before.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(f"no network namespaces here: {reason}")
    with contextlib.ExitStack() as stack:
        hosts = {name: _host(stack, index, name) for index, name in enumerate(names)}
        for host in hosts.values():
            for index, other in enumerate(hosts.values()):
                if other is not host:
                    _introduce(host, other, _mac(index))
        net = Network(hosts=hosts)
        thread = threading.Thread(target=net._switch, name="switch", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(net._stop.set)
        yield net


def why_not() -> str:
    """Return why this machine allows no such network; an empty string if it does."""
    if shutil.which("ip") is None:
        return "there is no `ip` command (Debian's package iproute2)"
    if os.geteuid() != 0:
        return f"only root may make network namespaces, and this is user {os.geteuid()}"
    if not TUN.exists():
        return f"the kernel offers no {TUN}"
    with contextlib.ExitStack() as stack:
        try:
            host = _host(stack, 0, "probe")
            _ip("netns", "exec", host.namespace, "true")
        except (OSError, RuntimeError) as error:
            return str(error)
    return ""


def _host(stack: contextlib.ExitStack, index: int, name: str) -> Host:
    """Make a namespace with a TAP device; the stack removes them."""
    namespace = f"graft-{os.getpid()}-{index}"
    device_name = f"graft{os.getpid() % 1_000_000}x{index}"  # at most 15 bytes
    _ip("netns", "add", namespace)
    stack.callback(_ip, "netns", "delete", namespace)
    device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(os.close, device)
    request = struct.pack("16sH22x", device_name.encode(), _IFF_TAP | _IFF_NO_PI)
    fcntl.ioctl(device, _TUNSETIFF, request)
    _ip("link", "set", device_name, "netns", namespace, "name", "eth0")
    inside = ("-n", namespace)
    mac, address = _mac(index).hex(":"), f"{SUBNET}.{index + 1}"
    _ip(*inside, "link", "set", "lo", "up")
    _ip(*inside, "link", "set", "eth0", "address", mac, "mtu", str(MTU), "up")
    _ip(*inside, "address", "add", f"{address}/24", "dev", "eth0")
    return Host(name=name, namespace=namespace, address=address, device=device)


def _introduce(host: Host, other: Host, mac: bytes) -> None:
    """Tell a host another's Ethernet address, lest a cut shows as a failed resolution."""
    entry = (other.address, "lladdr", mac.hex(":"), "dev", "eth0", "nud", "permanent")
    _ip("-n", host.namespace, "neighbour", "add", *entry)


def _mac(index: int) -> bytes:
    return _MAC + bytes([index + 1])


def _frames(device: int, most: int = 64) -> Iterator[bytes]:
    """Read what a device has, some frames at a time lest one host keeps out the others."""
    for _ in range(most):
        try:
            yield os.read(device, MTU + 64)
        except BlockingIOError:
            return


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"ip {' '.join(arguments)}: {said}")
