"""A trunk of one's own in another process of this machine, which ends with this one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from conf.schema import LinkConfig
from flower_app.serving.client import Joined, connect
from models import Cut

READY, ERROR = "ready", "error: "
"""How the lines begin by which the other process tells how it goes."""

END_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the other process is asked to serve."""

    source: str
    cut: tuple[int, int] | None
    folder: str
    threads: int = 0


def open_local(source: str | Path, *, cut: Cut | None = None, threads: int = 0) -> Joined:
    """Join a model's ends with its own trunk, served by another process on loopback.

    Parameters
    ----------
    source : str or path
        A run, a model, an adapter, or parts that hold both ends and trunk.
    cut : Cut, optional
        Where it is cut, if it does not say so itself.
    threads : int
        Torch threads of the other process; 0: torch's own choice.

    Raises
    ------
    ValueError
        In words, if the source cannot be served.
    """
    folder = Path(tempfile.mkdtemp(prefix="graft-"))
    cut_at = None if cut is None else (cut.bottom, cut.top)
    wish = Wish(source=str(source), cut=cut_at, folder=str(folder), threads=threads)
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, json.dumps(asdict(wish))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C stops an answer here, and not the trunk there
    )

    def end() -> None:
        _end(child)
        shutil.rmtree(folder, ignore_errors=True)

    try:
        assert child.stdout is not None
        _wait_until_ready(child.stdout)
        joined = connect(folder / "client-1.json", source)
    except BaseException:
        end()
        raise
    return replace(joined, after=end)


def _wait_until_ready(lines: IO[str]) -> None:
    told = []
    for line in lines:
        told.append(line.strip())
        if line.startswith(READY):
            return
        if line.startswith(ERROR):
            raise ValueError(line.removeprefix(ERROR).strip())
    raise ValueError(f"the trunk's process has ended ({' '.join(told)[-500:] or 'no word of it'})")


def _end(child: subprocess.Popen[str]) -> None:
    """The end of its input is what the child waits for."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    try:
        child.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def main() -> None:
    """Serve what the command line asks for until the standard input ends."""
    from flower_app.serving.requests import asked_to_stop
    from flower_app.serving.server import Serving, serve

    wish = Wish(**json.loads(sys.argv[1]))
    folder = Path(wish.folder)
    serving = Serving(
        sources=(("", wish.source),),
        access=folder,
        link=LinkConfig(bind="127.0.0.1:0"),
        cut=None if wish.cut is None else Cut(*wish.cut),
        threads=wish.threads,
    )
    try:
        with asked_to_stop(with_parent=True) as asked:
            serve(serving, grace=0.0, asked=asked, say=_say)
    except (ValueError, OSError) as error:
        _say(f"{ERROR}{' '.join(str(error).split())}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)  # whoever waits for this process need not wait until torch has gone, too


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever listened is gone: the end is near
        print(line, flush=True)


if __name__ == "__main__":
    main()
