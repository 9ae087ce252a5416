"""Where run folders are, and how one is found again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flower_app.runs.instants import BEFORE_ALL, instant

CHECKPOINTS, SUMMARY = "checkpoints", "summary.json"
MODEL = "model"
"""Key of the summary: where the model is, relative to the run folder if it lies in it."""
COMMON, MASKED = "common.safetensors", "masked.safetensors"
"""Where the server has no whole model: what of it is the same for all, and the ends' masked sum."""
STAMP = "%Y%m%d-%H%M%S"
"""Of UTC; begins the name of a run folder."""
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


def runs_folder(folder: str | Path = "") -> Path:
    """Return the absolute parent of the run folders.

    Parameters
    ----------
    folder : str or Path
        The value of `output.folder`; empty: `$GRAFT_HOME/runs`, by default `~/.graft/runs`. A
        relative one is refused: Flower decides the ServerApp's working folder.
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
    """Return folder and summary of each ended run under `folder`, whichever ended first first."""
    found = [(path, read_summary(path)) for path in _runs(folder, SUMMARY)]
    ended = [(path, summary) for path, summary in found if summary is not None]
    return sorted(ended, key=lambda run: (instant(run[1].get("finished")), run[0].name))


def read_summary(run: Path) -> dict[str, Any] | None:
    """Return what a run folder's summary says; None if there is none that can be read."""
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "status" in summary else None


def unfinished_runs(folder: str | Path = "") -> list[Path]:
    """Return the runs under `folder` that were stopped, killed or still go, the oldest first."""
    begun = _runs(folder, "metrics.jsonl")
    return in_order(path for path in begun if read_summary(path) is None)


def in_order(runs: Iterable[Path]) -> list[Path]:
    """Return run folders by the instant at which they began, the oldest first."""
    return sorted(runs, key=lambda run: (began(run), run.name))


def began(run: Path) -> datetime:
    """Return when a run began: by its summary or newest checkpoint, else by its folder's name."""
    told = read_summary(run) or _newest_state(run)
    if (recorded := instant(told.get("started"))) != BEFORE_ALL:
        return recorded
    try:
        return datetime.strptime(run.name[: len("20260101-120000")], STAMP).replace(tzinfo=UTC)
    except ValueError:
        return BEFORE_ALL


def find_last_run(experiment: str, folder: str | Path = "") -> Path:
    """Return the model of the newest finished run, which is what `last:NAME` means."""
    for run, summary in reversed(read_summaries(folder)):
        if summary.get("status") != FINISHED or summary.get("experiment") != experiment:
            continue
        if (model := _model(run, summary)) is not None:
            return model
    how = f"run `{'make demo' if experiment == 'demo' else 'graft run ' + experiment}` first"
    raise ValueError(
        f"no finished run of experiment '{experiment}' with a saved model under "
        f"{runs_folder(folder)}; {how}"
    )


def model_of(run: Path) -> Path | None:
    """Return the folder of the model that a run left; None if it left none."""
    told = read_summary(run)
    return None if told is None else _model(run, told)


def _runs(folder: str | Path, file: str) -> list[Path]:
    return [path.parent for path in runs_folder(folder).glob(f"*/{file}")]


def _newest_state(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of itself, unchecked."""
    for _, path in folders(run)[-1:]:
        with contextlib.suppress(OSError, ValueError):
            told = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return told if isinstance(told, dict) else {}
    return {}


def _model(run: Path, summary: Mapping[str, Any]) -> Path | None:
    """The folder of a run's model. Earlier Grafts wrote where it was, which may have moved."""
    if not (told := summary.get(MODEL)):
        return None
    places = (run / told, run / Path(told).name) if Path(told).is_absolute() else (run / told,)
    return next((place for place in reversed(places) if place.is_dir()), None)


def make_parent(parent: Path) -> None:
    """Make the parent of the run folders; a ValueError if nothing can be written there."""
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
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # perhaps a reader, which looks for a moment whether it is free
                time.sleep(0.05)
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
    """Make a run folder, new and empty; two runs that start in the same second get two."""
    stem = f"{datetime.now(UTC):{STAMP}}-{experiment}"
    make_parent(parent)
    for attempt in range(1, 1000):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"{parent} already has 999 runs called {stem}")
