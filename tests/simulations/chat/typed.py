"""A program on a terminal of its own (a pty), typed at by a test."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

PROMPT = "\x1b[?2004h"
"""What readies a terminal for pasting: a prompt is there."""
UP, TAB, ESCAPE, CTRL_C, CTRL_D = "\x1b[A", "\t", "\x1b", "\x03", "\x04"


class Typed:
    """`python CODE` on a terminal of 60 columns; it is ended with the context."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={
                **os.environ,
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
                "OMP_NUM_THREADS": "1",
                **env,
            },
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(theirs)
        self.shown, self._place = "", 0

    def __enter__(self) -> Typed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """Return what was shown up to a text that comes after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.shown[self._place :]:
            left = end - time.monotonic()
            assert left > 0, f"no {text!r} within {seconds} s; shown:\n{self.shown}"
            if select.select([self._ours], [], [], left)[0]:
                self.shown += self._read()
        before = self._place
        self._place = self.shown.index(text, before) + len(text)
        return self.shown[before : self._place]

    def _read(self) -> str:
        try:
            return os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # the program is gone
            raise AssertionError(f"it ended; shown:\n{self.shown}") from None


def _own_terminal() -> None:
    """Make the pty the terminal that Ctrl-C is sent by."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
