"""Start processes and stop exactly those: by process id, whatever happens in between."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from simulations.launch.watcher import MARK, start_watcher

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
GRACE_SECONDS = 10.0
"""How long a process may take to end after it was asked to."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process runs: this machine as it is, or a network namespace on it."""

    address: str = "127.0.0.1"
    """Under which the processes at other places reach it."""
    within: tuple[str, ...] = ()
    """What precedes its commands, such as `ip netns exec NAME`."""


LOOPBACK = Place()


class Started:
    """A process that this program started, and everything that process started in turn.

    Parameters
    ----------
    name : str
        What it is called in messages.
    command : sequence of str
        Program and arguments.
    env : mapping
        Its environment.
    log : Path
        File that takes its output.
    cwd : Path
        Its working folder.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path
    ) -> None:
        self.name, self.log = name, log
        self._family: list[psutil.Process] = []
        with log.open("ab") as output:
            # A session of its own: Ctrl-C reaches only us, and we stop it in order.
            self.process = subprocess.Popen(
                command,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it is still there."""
        return self.process.poll() is None

    def tail(self, lines: int = 20) -> str:
        """Return the end of its output.

        Parameters
        ----------
        lines : int
            How many lines.

        Returns
        -------
        str
            The last lines.
        """
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def ask_to_end(self) -> None:
        """Send it and its descendants, while it still has them, a termination signal."""
        self._family = _descendants(self.process.pid)
        if self.running:
            self.process.terminate()
        for process in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def end(self) -> None:
        """Wait for its end, and end by force what is left of it and its descendants."""
        try:
            self.process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(self._family, timeout=GRACE_SECONDS / 2)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=GRACE_SECONDS / 2)


class Family(list[Started]):
    """Processes that end together."""

    def __init__(self) -> None:
        super().__init__()
        self.mark = {MARK: uuid.uuid4().hex}
        """To be in the environment of each, so that those they leave behind are found."""


@contextlib.contextmanager
def stopping(*folders: Path) -> Iterator[Family]:
    """Collect processes and stop them at the end, however the end comes.

    Parameters
    ----------
    *folders : Path
        Removed afterwards.

    Yields
    ------
    Family
        Append what was started to it. The signals that end a program unwind this context; if the
        program is killed, a process that watches it stops all that bears the family's mark.
    """
    family = Family()
    with _unwinding_on_signals(), _watched(family, folders):
        try:
            yield family
        finally:
            for process in reversed(family):
                process.ask_to_end()
            for process in reversed(family):
                process.end()


@contextlib.contextmanager
def _watched(family: Family, folders: Sequence[Path]) -> Iterator[None]:
    """Have another process clean up behind this one, also if this one cannot."""
    watcher = start_watcher(family.mark[MARK], folders)
    try:
        yield
    finally:
        watcher.communicate()  # closes its input, which it waits for


def wait_until(ready: Any, *, seconds: float, what: str, process: Started | None = None) -> None:
    """Wait for a condition.

    Parameters
    ----------
    ready : callable
        Returns whether the condition holds.
    seconds : float
        How long to wait.
    what : str
        What is waited for, for the error.
    process : Started, optional
        Give up at once, with its output, when it ends.
    """
    end = time.monotonic() + seconds
    while not ready():
        if process is not None and not process.running:
            raise RuntimeError(
                f"{process.name} ended with exit code {process.process.returncode} "
                f"while waiting for {what}:\n{process.tail()}"
            )
        if time.monotonic() > end:
            output = f"; {process.name} printed:\n{process.tail()}" if process else ""
            raise RuntimeError(f"waited {seconds:.0f} s for {what}{output}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on.

    Parameters
    ----------
    count : int
        How many.

    Returns
    -------
    list of int
        Different ports.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def program(name: str) -> str:
    """Return the path of a console command of this Python environment.

    Parameters
    ----------
    name : str
        `flwr`, for instance.

    Returns
    -------
    str
        Its path; the environment need not be activated.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise ValueError(f"{path} does not exist; `make setup` installs it")
    return str(path)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Turn the signals that end a program into exceptions, so that `finally` blocks run.

    SIGINT and SIGQUIT count even where a shell started the program in the background, with both
    ignored. A SIGHUP that is ignored stays so: `nohup` asked for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in _ENDING}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def leave(number: int, frame: FrameType | None) -> None:
        for each in before:  # the next one must not interrupt the clean-up
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    for each in before:
        signal.signal(each, leave)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)
