"""What every test needs: its own Graft and Flower homes, and quiet libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _own_homes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test out of the runs and the SuperLink of whoever runs it."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("GRAFT_HOME", str(home / "graft"))
    monkeypatch.setenv("FLWR_HOME", str(home / "flwr"))


@pytest.fixture(scope="session")
def project() -> Path:
    """Return the project folder."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch on one thread: tiny models are faster so, and two test runs share the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
