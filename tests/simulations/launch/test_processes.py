"""However a program ends, what it started ends too, daemons of its daemons included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from simulations.launch import watcher
from simulations.launch.watcher import MARK, end_marked, marked, start_watcher

PROGRAM = """
import os, sys, time
from pathlib import Path
from simulations.launch.processes import Started, stopping

home = Path(sys.argv[1])
with stopping(home / "session") as family:
    code = (
        "import subprocess, sys, time; "  # its child leaves the group and outlives it, as Ray's do
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
        "start_new_session=True); print('up', flush=True)"
    )
    env = os.environ | family.mark
    command = [sys.executable, "-c", code]
    family.append(Started("daemon", command, env=env, log=home / "log", cwd=home))
    while "up" not in family[0].tail():
        time.sleep(0.05)
    print(*family.mark.values(), flush=True)
    time.sleep(600)
"""


def _gone(mark: str, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return not left


@pytest.mark.parametrize("name", ["SIGHUP", "SIGQUIT", "SIGTERM", "SIGINT", "SIGKILL"])
def test_nothing_outlives_the_program(name: str, tmp_path: Path) -> None:
    (tmp_path / "session").mkdir()
    ignoring = "import signal; signal.signal(2, signal.SIG_IGN); signal.signal(3, signal.SIG_IGN)"
    program = subprocess.Popen(  # as a shell starts it in the background
        [sys.executable, "-c", f"{ignoring}\n{PROGRAM}", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert program.stdout is not None
    mark = program.stdout.readline().strip()
    try:
        assert marked(mark)

        program.send_signal(getattr(signal, name))
        program.wait(30)

        assert _gone(mark)
        while (tmp_path / "session").exists():  # the watcher does this last
            time.sleep(0.05)
    finally:
        program.kill()
        end_marked(mark)


def test_nohup_is_obeyed(tmp_path: Path) -> None:
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from simulations.launch.processes import stopping\n"
        "with stopping(): os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "went on\n"


def test_the_watcher_is_ours_wherever_the_program_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("simulations", "psutil"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit(9)")
    (tmp_path / "session").mkdir()
    monkeypatch.chdir(tmp_path)

    started = start_watcher(uuid.uuid4().hex, [tmp_path / "session"])
    started.communicate(timeout=30)

    assert started.returncode == 0
    assert not (tmp_path / "session").exists()


def test_only_what_bears_the_mark_is_ended() -> None:
    mark, other = uuid.uuid4().hex, uuid.uuid4().hex
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours = subprocess.Popen(sleep, env=os.environ | {MARK: mark})
    others = [subprocess.Popen(sleep, env=os.environ | {MARK: other}), subprocess.Popen(sleep)]
    try:
        end = time.monotonic() + 20  # a process has its parent's environment until it is another
        while not marked(mark) and time.monotonic() < end:
            time.sleep(0.02)
        end_marked(mark)
        assert not marked(mark)
        assert all(psutil.pid_exists(each.pid) and each.poll() is None for each in others)
    finally:
        for each in (ours, *others):
            each.kill()
            each.wait()


def test_one_that_was_not_seen_at_first_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    late = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    seen: list[list[psutil.Process]] = [[], [psutil.Process(late.pid)]]
    monkeypatch.setattr(watcher, "marked", lambda mark: seen.pop(0) if seen else [])
    try:
        end_marked("a mark")
        assert not psutil.pid_exists(late.pid)
    finally:
        late.kill()
