"""Ends what a program started once the program is gone, however it went: kill -9 too.

It waits for the end of its standard input, whose other end the program alone holds. Then it ends
every process whose environment bears the program's mark, which daemons of daemons inherit, and
removes the folders that it was told of.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

MARK = "GRAFT_STARTED_BY"
"""Variable of the environment by which all that a program started is known, and nothing else."""
GRACE_SECONDS = 4.0
"""How long a process that was asked to end may take."""


def start_watcher(mark: str, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Start a watcher over this process.

    Parameters
    ----------
    mark : str
        Value of `MARK` in the environment of what is to end.
    folders : sequence of Path
        Removed then.

    Returns
    -------
    subprocess.Popen
        It ends after its standard input was closed.
    """
    return subprocess.Popen(
        # As a file, and with -P: a folder `simulations` of the user's is not taken for ours.
        [sys.executable, "-P", __file__, mark, *map(str, folders)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # what is sent to the program's group does not reach it
    )


def marked(mark: str) -> list[psutil.Process]:
    """Processes of this user that bear a mark.

    Parameters
    ----------
    mark : str
        As given to `start_watcher`.

    Returns
    -------
    list of psutil.Process
        Those that are still there.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


def _with_their_sessions(found: list[psutil.Process], sessions: set[int]) -> list[psutil.Process]:
    """Add who shares a session with a marked leader: Ray's agents write over their environment."""
    pids = {process.pid for process in found}
    for pid in pids:
        with contextlib.suppress(OSError):
            sessions |= {os.getsid(pid)} & pids
    others = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in pids and os.getsid(process.pid) in sessions:
                others.append(process)
    return [*found, *others]


def end_marked(mark: str) -> None:
    """End every marked process, and their sessions: ask first, then by force, until none is left.

    None means twice in a row: one that is becoming another program has no environment for a moment.
    """
    sessions: set[int] = set()
    ask, missed, deadline = True, 0, time.monotonic() + 10 * GRACE_SECONDS
    while missed < 2 and time.monotonic() < deadline:
        left = _with_their_sessions(marked(mark), sessions)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate() if ask else process.kill()
        psutil.wait_procs(left, timeout=GRACE_SECONDS)
        ask = ask and not left
        missed = 0 if left else missed + 1
        if missed:
            time.sleep(0.2)


def main() -> None:
    """Wait for the program's end and clean up after it."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(each, signal.SIG_IGN)
    sys.stdin.buffer.read()
    mark, *folders = sys.argv[1:]
    end_marked(mark)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
