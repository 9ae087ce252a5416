"""Where run folders are, and how one is found again."""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"


def runs_folder(folder: str | Path = "") -> Path:
    """Return the parent of the run folders.

    Parameters
    ----------
    folder : str or Path
        The value of `output.folder`; empty: `$GRAFT_HOME/runs`, by default `~/.graft/runs`.

    Returns
    -------
    Path
        An absolute path. A relative one is refused: Flower decides the ServerApp's working folder.
    """
    home = os.environ.get("GRAFT_HOME") or "~/.graft"
    source, path = "output.folder", Path(folder).expanduser()
    if not str(folder):
        source, path = "GRAFT_HOME", Path(home).expanduser() / "runs"
    if not path.is_absolute():
        raise ValueError(
            f"{source} is the relative path '{folder or home}', and a ServerApp does not run in "
            f"the folder you start it from; give an absolute path, such as {Path.cwd() / path}"
        )
    return path


def read_summaries(folder: str | Path = "") -> list[tuple[Path, dict[str, Any]]]:
    """Return the runs under `folder` that have ended, the oldest first.

    Parameters
    ----------
    folder : str or Path
        As in `runs_folder`.

    Returns
    -------
    list of (Path, dict)
        Run folder and summary.
    """
    found = []
    for path in runs_folder(folder).glob("*/summary.json"):
        try:
            found.append((path.parent, json.loads(path.read_text(encoding="utf-8"))))
        except json.JSONDecodeError:
            continue
    return sorted(found, key=lambda run: (run[1].get("finished", ""), run[0].name))


def unfinished_runs(folder: str | Path = "") -> list[Path]:
    """Return the run folders under `folder` without a summary: stopped, killed or still going.

    Parameters
    ----------
    folder : str or Path
        As in `runs_folder`.

    Returns
    -------
    list of Path
        Run folders, the oldest first.
    """
    begun = (path.parent for path in runs_folder(folder).glob("*/metrics.jsonl"))
    return sorted(path for path in begun if not (path / "summary.json").exists())


def find_last_run(experiment: str, folder: str | Path = "") -> Path:
    """Return the model of the newest finished run, which is what `last:NAME` means.

    Parameters
    ----------
    experiment : str
        Name of the experiment.
    folder : str or Path
        As in `runs_folder`.

    Returns
    -------
    Path
        A model folder.
    """
    for _, summary in reversed(read_summaries(folder)):
        model = summary.get("model")
        if summary.get("status") != FINISHED or summary.get("experiment") != experiment:
            continue
        if model and Path(model).is_dir():
            return Path(model)
    how = f"run `{'make demo' if experiment == 'demo' else 'graft run ' + experiment}` first"
    raise ValueError(
        f"no finished run of experiment '{experiment}' with a saved model under "
        f"{runs_folder(folder)}; {how}"
    )


def make_parent(parent: Path) -> None:
    """Make the parent of the run folders; a ValueError if nothing can be written there.

    Parameters
    ----------
    parent : Path
        What `runs_folder` returns.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(b" ")
    except OSError as error:
        raise ValueError(
            f"output.folder {parent} cannot be written: {error.strerror or error}; "
            "choose another one (output.folder, or GRAFT_HOME)"
        ) from error


def round_of(path: Path) -> int | None:
    """Return the round of a checkpoint by its folder's name; None if it is none."""
    match = re.fullmatch(r"round-(\d{4,})", path.name)
    return int(match.group(1)) if match else None


def folders(run: Path) -> list[tuple[int, Path]]:
    """Return the rounds and folders of a run's checkpoints, the oldest first, whole or not."""
    named = ((round_of(path), path) for path in (run / CHECKPOINTS).glob("round-*"))
    return sorted((number, path) for number, path in named if number is not None)


def newest_round(run: Path) -> int | None:
    """Return the round of a run's newest checkpoint, unchecked; None if it has none."""
    there = folders(run)
    return there[-1][0] if there else None


class RunLock:
    """The right to write a run folder, which one process has at a time.

    The system takes it back from a process that ends, however it ends.

    Parameters
    ----------
    run : Path
        The run folder.

    Raises
    ------
    ValueError
        If another process has it.
    """

    def __init__(self, run: Path) -> None:
        self._handle: int | None = os.open(run, os.O_RDONLY)  # the folder itself: no file is left
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"{run} is being written by another process: this run is still going. Wait for its "
                "end, or stop it (`flwr list`, `flwr stop RUN_ID`)"
            ) from None

    def release(self) -> None:
        """Let another process have it; a second call does nothing."""
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None


def find_run(run: str) -> Path:
    """Return a run folder by its path, or by its name as `graft runs` shows it.

    Raises
    ------
    ValueError
        If there is none.
    """
    path = Path(run).expanduser()
    for folder in (path, runs_folder() / run):
        if folder.is_absolute() and folder.is_dir():
            return folder.resolve()
    where = f"{path} is no folder" if path.is_absolute() else f"no folder {runs_folder() / run}"
    raise ValueError(
        f"{run!r} is no run: {where}; give its absolute path (`graft runs` lists them)"
    )


def new_folder(parent: Path, experiment: str) -> Path:
    """Make a run folder; two runs that start in the same second get two.

    Parameters
    ----------
    parent : Path
        What `runs_folder` returns.
    experiment : str
        Name of the experiment.

    Returns
    -------
    Path
        A new, empty folder.
    """
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{experiment}"
    make_parent(parent)
    for attempt in range(1, 1000):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"{parent} already has 999 runs called {stem}")
