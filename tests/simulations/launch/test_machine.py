"""What a machine lacks is named with the remedy, before anything is started."""

from __future__ import annotations

import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.rules import ConfigError
from simulations.launch import machine as tool
from simulations.launch.machine import (
    Machine,
    check_machine,
    cpus_for_ray,
    is_free,
    look_at_machine,
    read_quota,
    short_parent,
)

GOOD = Machine(cpus=2, temporary=Path("/tmp"), shared_memory=2**30, disk=2**34)


def test_this_machine_is_measured() -> None:
    found = look_at_machine()
    assert found.cpus >= 1
    assert found.disk > 0


@pytest.mark.parametrize("change", [{}, {"cpus": 1}, {"shared_memory": None}])
def test_a_machine_that_suffices(change: dict[str, Any]) -> None:
    assert check_machine(replace(GOOD, **change)) == []


def test_little_shared_memory_is_slow() -> None:
    (note,) = check_machine(replace(GOOD, shared_memory=64 * 2**20))
    assert re.search("/dev/shm has 64 MB free: .* slow; .*--shm-size=1g", note)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temporary": None}, "a path of at most .* bytes; .*: set TMPDIR"),
        ({"disk": 100 * 2**20}, "has 100 MB free, and a run needs 512; free space"),
    ],
)
def test_a_machine_that_does_not(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_machine(replace(GOOD, **change))


@pytest.mark.parametrize(
    ("count", "quota", "seen"), [(8, None, 8), (8, 2.5, 2), (8, 0.5, 1), (1, None, 1), (2, 16.0, 2)]
)
def test_ray_sees_what_a_container_may_use(count: int, quota: float | None, seen: int) -> None:
    assert cpus_for_ray(count, quota) == seen


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({}, None),
    ],
)
def test_quota_of_both_kinds_of_control_groups(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_quota(tmp_path) == quota


def test_a_long_temporary_folder_gives_way_to_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    assert short_parent((str(long), "/tmp")) == Path("/tmp")
    assert short_parent((str(long), str(tmp_path / "none"))) is None
    monkeypatch.setattr(tool, "SOCKET_PATH_BYTES", 1000)
    assert short_parent((str(long), "/tmp")) == long


def test_a_taken_port_is_known() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not is_free("127.0.0.1", taken.getsockname()[1])
    assert is_free("127.0.0.1", 0)
    assert not is_free("192.0.2.1", 9393), "an address of another machine"
