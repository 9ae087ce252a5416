"""A SuperLink of one's own needs neither this user's home nor `uv`, and joins nothing of theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.launch.local_flower import flower_env


def test_flower_keeps_to_its_own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("FLWR_HOME", "/somewhere")

    env = flower_env(tmp_path)

    assert "RAY_ADDRESS" not in env, "a simulation would run on that cluster"
    assert env["FLWR_HOME"] == str(tmp_path)
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
