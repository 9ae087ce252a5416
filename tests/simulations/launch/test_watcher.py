"""Who lost the mark is ended with the session of one that bears it, as Ray's agents are."""

from __future__ import annotations

import os
import subprocess

import psutil

from simulations.launch.watcher import MARK, end_marked


def test_a_process_without_its_environment_ends_with_its_session() -> None:
    command = "env -i sleep 100 & echo $!; exec sleep 100"
    leader = subprocess.Popen(
        ["sh", "-c", command],
        env={**os.environ, MARK: "mark-of-this-test"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert leader.stdout is not None
    bare = psutil.Process(int(leader.stdout.readline()))

    end_marked("mark-of-this-test")

    assert not psutil.pid_exists(leader.pid)
    assert not bare.is_running() or bare.status() == psutil.STATUS_ZOMBIE
