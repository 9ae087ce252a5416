"""A sink is one new file; whatever it does, the run goes on."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.rules import ConfigError
from conf.schema import Config, OutputConfig, TrackingConfig
from flower_app.check import check_extras, check_names
from flower_app.metrics.run import RunMetrics
from flower_app.metrics.serve import new_registry
from flower_app.runs import sinks
from flower_app.runs.journal import as_record
from flower_app.runs.recorder import Recorder
from flower_app.runs.sinks import registry
from flower_app.runs.sinks._scalars import scalars
from strategies.events import RoundDone, StepDone

TOY = """
class Sink:
    def __init__(self, run):
        self.file = run.folder / "toy.txt"

    def start(self):
        self.file.write_text("started\\n")

    def event(self, event):
        self.add(f"{type(event).__name__} {event.round}\\n")

    def finish(self, summary):
        self.add(summary["status"] + "\\n")

    def add(self, text):
        with self.file.open("a") as file:
            file.write(text)
"""
STEP = StepDone(
    round=1,
    attempt=1,
    client="a",
    step=1,
    steps=1,
    loss=5.0,
    tokens=9,
    grad_norm=1.0,
    lr=0.1,
    bytes_up=1,
    bytes_down=1,
    seconds={},
)
ROUND = RoundDone(round=1, train={"loss": 5.0}, evaluate=None, training=None, evaluation=None)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of a run that names a toy, which a stranger put beside our sinks."""
    own = tmp_path / "sinks"
    own.mkdir()
    (own / "toy_file.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setattr(sinks, "__path__", [*sinks.__path__, str(own)])
    monkeypatch.setattr(sinks.__spec__, "submodule_search_locations", sinks.__path__)
    monkeypatch.delitem(__import__("sys").modules, f"{sinks.__name__}.toy_file", raising=False)
    return replace(
        Config(),
        output=OutputConfig(folder=str(tmp_path / "runs")),
        tracking=TrackingConfig(sinks=("toy-file",)),
    )


def run(config: Config) -> tuple[Path, list[str]]:
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    recorder.start()
    recorder(STEP)
    recorder(ROUND)
    recorder.finish()
    return recorder.folder, lines


def test_a_sink_is_one_new_file(config: Config) -> None:
    own = ["console", "journal", "mlflow", "tensorboard", "trackio", "wandb"]
    assert registry.names() == sorted([*own, "toy-file"])
    check_names(config)

    folder, lines = run(config)

    assert (folder / "toy.txt").read_text() == "started\nStepDone 1\nRoundDone 1\nfinished\n"
    assert not [line for line in lines if "WARNING" in line]


def test_a_sink_that_nobody_offers_is_refused_with_the_nearest(config: Config) -> None:
    typo = replace(config, tracking=TrackingConfig(sinks=("toy-fil",)))
    with pytest.raises(ConfigError, match=r"tracking\.sinks must be one of .*'toy-file'\?"):
        check_names(typo)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("__init__(self, run)", ""),
        ("start(self)", ""),
        ("event(self, event)", "started\n"),
        ("finish(self, summary)", "started\nStepDone 1\nRoundDone 1\n"),
        (None, ""),
    ],
)
def test_a_sink_that_fails_is_dropped_and_the_run_goes_on(
    broken: str | None,
    told: str,
    config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = "import a_tracker_that_is_not_installed\n" + TOY
    if broken:
        text = TOY.replace(f"def {broken}:", f"def {broken}:\n        raise KeyError('no') #")
    (tmp_path / "sinks" / "toy_file.py").write_text(text, encoding="utf-8")

    folder, lines = run(config)

    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "the sink toy-file of tracking.sinks failed and is told nothing more: " in warning
    toy = folder / "toy.txt"
    assert (toy.read_text() if toy.exists() else "") == told
    assert (folder / "summary.json").exists()
    kinds = [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").open()]
    assert kinds == ["start", "step", "round"]
    assert any(line.startswith("finished:") for line in lines)


def test_naming_what_is_always_told_tells_it_once(config: Config) -> None:
    always: Any = ("console", "journal")
    _, lines = run(replace(config, tracking=TrackingConfig(sinks=always)))
    assert sum(line.startswith("finished:") for line in lines) == 1


def test_a_tracker_that_hangs_or_is_slow_holds_nobody_up(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is left behind with what it did not take in; the steps left out are counted."""
    text = TOY.replace(
        'self.add(f"{type(event).__name__} {event.round}\\n")', "import threading; GATE.wait(60)"
    )
    assert text != TOY
    (tmp_path / "sinks" / "toy_file.py").write_text(
        f"{text}\nfrom threading import Event\nGATE = Event()\n"
    )
    monkeypatch.setattr(registry, "FLUSH", 0.05)
    monkeypatch.setattr(registry, "WAITING", 3)
    lines: list[str] = []
    recorder = Recorder(config, say=lines.append)
    recorder.start()
    for _ in range(10):
        recorder(STEP)
    recorder(ROUND)
    recorder.finish()
    registry.registry.load("flower_app.runs.sinks", "toy-file").GATE.set()

    first, second = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "toy-file of tracking.sinks did not take in the rest within 0.05 s" in first
    assert "was too slow: " in second
    assert 6 <= int(second.split("was too slow: ")[1].split()[0]) <= 7  # one may be at work
    assert any(line.startswith("finished:") for line in lines)
    assert len((recorder.folder / "metrics.jsonl").read_text().splitlines()) == 12


def test_a_tracker_that_wants_to_end_the_process_is_named_too(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = TOY.replace(
        "def event(self, event):", "def event(self, event):\n        raise SystemExit(3)"
    )
    (tmp_path / "sinks" / "toy_file.py").write_text(text)
    folder, _ = run(config)
    assert (
        "toy-file of tracking.sinks failed and is told nothing more: SystemExit: 3" in caplog.text
    )
    assert (folder / "summary.json").exists()


def test_a_slow_tracker_is_told_everything_in_order_before_the_run_ends(
    config: Config, tmp_path: Path
) -> None:
    text = TOY.replace("def event(self, event):", "def event(self, event):\n        sleep(0.02)")
    (tmp_path / "sinks" / "toy_file.py").write_text(f"from time import sleep\n{text}")
    recorder = Recorder(config, say=lambda line: None)
    recorder.start()
    for number in range(10):
        recorder(replace(STEP, round=number))
    recorder.finish()
    told = (recorder.folder / "toy.txt").read_text().splitlines()
    assert told == ["started", *(f"StepDone {number}" for number in range(10)), "finished"]


def test_a_tracker_without_its_library_is_refused_before_the_run(
    config: Config, tmp_path: Path
) -> None:
    check_extras(config)
    (tmp_path / "sinks" / "toy_file.py").write_text(f'NEEDS = "not_installed_at_all"\n{TOY}')
    with pytest.raises(ConfigError, match=r"not_installed_at_all.*pip install 'graft\[toy-file\]'"):
        check_extras(config)


def test_every_tracker_of_ours_has_an_extra_that_installs_what_it_needs(project: Path) -> None:
    settings = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    extras = settings["project"]["optional-dependencies"]
    for name in ("mlflow", "tensorboard", "trackio", "wandb"):
        needed = registry.registry.load("flower_app.runs.sinks", name).NEEDS
        assert [one for one in extras[name] if one.startswith(needed)]


def test_the_servers_own_evaluation_has_tags_of_its_own() -> None:
    """Whoever judges a run by `data.central_path` sees that loss, in trackers and Prometheus."""
    event = RoundDone(
        round=1, train=None, evaluate=None, training=None, evaluation=None, central={"loss": 2.0}
    )
    told = scalars(as_record(event))
    assert told is not None
    assert told.values["eval/central_loss"] == 2.0
    assert told.values["eval/central_perplexity"] == pytest.approx(math.exp(2))
    assert "eval/loss" not in told.values
    metrics = new_registry()
    RunMetrics(metrics, Config(), Path("run"))(event)
    assert metrics.get_sample_value("graft_run_loss", {"data": "central"}) == 2.0
