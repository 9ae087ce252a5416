"""What of a run's output reaches the console."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from flower_app.logs import MARK
from simulations.launch.local_flower import worth_reading

_ACTOR = re.compile(r"^\([\w:.]+ pid=\d+[^)]*\) ")
_TRACE = re.compile(r"^Traceback \(most recent call last\)|^ray::\S+ \(pid=")
_CHAINED = re.compile(r"^(The above exception was the direct|During handling of the above)")
_OURS = re.compile(r"^  round \d+/\d+ ")
_MACHINERY = re.compile(
    r"^\[?\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s.*?\bERROR services\.py\b"
    r"|^ERROR *: *(Simulation raised an exception|Exit Code: \d+)\s*$"
    r"|^An unhandled exception occurred when running the simulation"
    r"|^For more information, visit: <https://flower\.ai/"
)


class Console:
    """Passes on the app's lines and errors, without tracebacks and Flower's housekeeping.

    Parameters
    ----------
    say : callable
        Takes one line for the console.
    verbose : bool
        Pass on everything.
    """

    def __init__(self, say: Callable[[str], None], verbose: bool = False) -> None:
        self._say, self._verbose = say, verbose
        self._in_trace = False
        self._failures: set[str] = set()
        self.folder: Path | None = None
        """The run folder, once a line has named it."""

    def __call__(self, line: str) -> None:
        """Pass the line on if it is worth it.

        Parameters
        ----------
        line : str
            A line without colours.
        """
        if line.startswith("run folder: "):
            self.folder = Path(line.removeprefix("run folder: "))
        if line.startswith("failed: "):
            self._failures.add(line.removeprefix("failed: "))
        if self._verbose or (not self._is_trace(line) and worth_reading(line)):
            ours = _ACTOR.sub("", line)
            self._say(without_actor(line) if ours.startswith(MARK) else line)

    def _is_trace(self, line: str) -> bool:
        text = _ACTOR.sub("", line)
        if _TRACE.search(text):
            self._in_trace = True
            return True
        if _MACHINERY.search(text) or _CHAINED.search(text):
            return True
        if text.startswith(('  File "', "    ")):  # also after a line of ours between two of it
            return True
        if self._in_trace and (not text.strip() or text[0].isspace()):
            return _OURS.search(text) is None
        # The line below a traceback names the error; the recorder may have said it already.
        below, self._in_trace = self._in_trace, False
        return below and text in self._failures


def without_actor(line: str) -> str:
    """Return a line without what Ray puts before those of its processes, and without our mark.

    Parameters
    ----------
    line : str
        A line without colours.
    """
    return _ACTOR.sub("", line).removeprefix(MARK)
