"""What Prometheus is told of a run is what the run did."""

from __future__ import annotations

import socket
import sys
import urllib.request
from importlib import import_module
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity
from prometheus_client.parser import text_string_to_metric_families

from conf.rules import ConfigError
from conf.schema import Config, RuntimeConfig
from flower_app.build import resolve_model
from flower_app.metrics.serve import new_registry, served
from flower_app.runs.recorder import Recorder
from flower_app.server_app import run_experiment
from simulations.launch.preflight import check_config
from strategies.engine.meter import SILENT
from strategies.events import Event, RoundDone, StepDone
from tests.flower_app.grid import InProcessGrid
from tests.flower_app.test_app import tiny_config


@pytest.fixture(autouse=True)
def _flower_task(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their labels, as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scraping(Recorder):
    """Asks for the metrics after every round, as soon as the round has been told."""

    def __init__(self, config: Config, port: int) -> None:
        super().__init__(config, say=lambda line: None)
        self.port, self.events = port, list[Event]()
        self.scraped: list[dict[tuple[str, ...], float]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, RoundDone):
            self.scraped.append(scrape(self.port))
        self.events.append(event)
        super().__call__(event)


@pytest.mark.parametrize("transport", ["stream", "messages"])
def test_what_is_scraped_is_what_the_run_did(transport: str, tmp_path: Path, port: int) -> None:
    config = tiny_config(
        tmp_path,
        f"runtime.metrics_port={port} link.transport={transport} train.accumulate=2",
    )
    recorder = Scraping(config, port)
    recorder.start()
    run_experiment(resolve_model(config), InProcessGrid(clients=2), recorder)

    found, steps = recorder.scraped[-1], [e for e in recorder.events if isinstance(e, StepDone)]
    rounds = [e for e in recorder.events if isinstance(e, RoundDone)]
    assert found["graft_run_steps_total",] == found["graft_trunk_steps_total",] == len(steps) == 12
    assert found["graft_run_tokens_total",] == sum(step.tokens for step in steps)
    assert found["graft_trunk_tokens_total",] > found["graft_run_tokens_total",]  # evaluation too
    # The clients count for themselves what they send and receive.
    assert found["graft_trunk_bytes_total", "up"] == sum(e.bytes_up for e in rounds)
    # But for the trunk's first word, of which a client learns what to count, and its last one.
    uncounted = found["graft_trunk_bytes_total", "down"] - sum(e.bytes_down for e in rounds)
    assert 0 <= uncounted <= 10 * 128
    assert found["graft_trunk_work_seconds_count", "backward"] == 2 * len(steps)
    assert found["graft_trunk_work_seconds_count", "step"] == len(steps)
    forwards = found["graft_trunk_work_seconds_count", "forward"]
    assert found["graft_trunk_micro_batches_total",] == forwards > 2 * len(steps)
    assert found["graft_trunk_frame_seconds_count", "compute"] == forwards
    assert (
        found["graft_trunk_frame_seconds_sum", "compute"]
        >= (found["graft_trunk_work_seconds_sum", "forward"])
    )
    assert found["graft_trunk_sessions_opened_total",] == 2 * 5  # three evaluations, two trainings
    assert found["graft_trunk_connections_total",] == 10
    assert found["graft_trunk_reconnects_total",] == found["graft_trunk_refused_total",] == 0
    assert found["graft_trunk_sessions",] == found["graft_trunk_frames_in_progress",] == 0
    assert found["graft_trunk_in_flight_bytes",] == 0
    assert found["graft_trunk_in_flight_limit_bytes",] == config.link.max_in_flight_mb * 2**20
    # This round is told after the scrape.
    assert found["graft_run_round",] == 1
    assert found["graft_run_rounds",] == 2
    assert found["graft_run_loss", "held-out"] == pytest.approx(rounds[1].evaluate["loss"])  # type: ignore[index]
    assert found["graft_run_clients", "counted"] == 2
    assert found["graft_run_info", "demo", recorder.folder.name, "splitfed-v1"] == 1
    assert found["process_resident_memory_bytes",] > 2**20
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_without_a_port_nothing_is_imported_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import of what is None in `sys.modules` fails."""
    for name in ("prometheus_client", *(f"flower_app.metrics.{n}" for n in ("run", "serve"))):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "flower_app.metrics.of_run")
    recorder = Recorder(tiny_config(tmp_path), say=lambda line: None)
    with import_module("flower_app.metrics.of_run").metrics_of(recorder.config, recorder) as none:
        assert (none.meter, none.observer) == (SILENT, recorder)


def test_a_port_that_is_taken_is_refused_in_words_before_and_in_the_run(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"runtime\.metrics_port={port}: .* free port"):
            check_config(tiny_config(tmp_path, f"runtime.metrics_port={port}"))
        with (
            pytest.raises(ConfigError, match=rf"runtime\.metrics_port={port}: nothing can listen"),
            served(new_registry(), "127.0.0.1", port),
        ):
            pass


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="a port up to 65535; 0: none"):
        RuntimeConfig(metrics_port=70000)
