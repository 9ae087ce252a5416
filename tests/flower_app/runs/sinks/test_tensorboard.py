"""What TensorBoard reads back is what happened, once, also in a run that was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from conf.schema import Config
from flower_app.runs.recorder import Recorder
from flower_app.runs.resume import Point
from tests.flower_app.runs.sinks.helpers import STEPS, config_for, events, loss, run, step_of


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


def points(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]


def hparams(found: EventAccumulator) -> dict[str, Any]:
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = HParamsPluginData.FromString(content).session_start_info
    return {
        name: getattr(value, str(value.WhichOneof("kind")))
        for name, value in started.hparams.items()
    }


def status(found: EventAccumulator) -> int:
    content = found.SummaryMetadata("_hparams_/session_end_info").plugin_data.content
    return int(HParamsPluginData.FromString(content).session_end_info.status)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return config_for(tmp_path, "tensorboard")


def test_what_is_read_back_is_what_happened(config: Config) -> None:
    folder, _ = run(config, 0, 1, 2)

    found = read(folder)
    want = [
        ((number - 1) * STEPS + step, loss(number, step, "b"))
        for number in (1, 2)
        for step in range(1, STEPS + 1)
    ]
    assert points(found, "train/loss/b") == want
    assert points(found, "eval/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert points(found, "train/loss") == [(1, 3.0), (2, 2.0)]
    assert points(found, "train/lr/a")[0] == (1, 0.01)
    assert points(found, "train/tokens_per_second/a")[0] == (1, 200)
    assert points(found, "round/missing")[-1] == (2, 1)
    assert points(found, "round/tokens_per_second")[-1] == (2, 400)
    assert hparams(found)["train.lr"] == 0.01
    assert hparams(found)["train.strategy"] == "splitfed-v1"
    assert not any(name.startswith(("output", "tracking")) for name in hparams(found))
    assert status(found) == 1  # success
    assert [path.name for path in (folder / "tensorboard").iterdir() if path.is_dir()] == []


def test_a_run_that_failed_is_told_as_such(config: Config) -> None:
    recorder = Recorder(config, say=lambda line: None)
    recorder.start()
    recorder.fail("no quorum")
    assert status(read(recorder.folder)) == 2  # failure


def test_a_resumed_run_shows_nothing_twice_and_nothing_that_was_undone(config: Config) -> None:
    killed = Recorder(config, say=lambda line: None)
    killed.start()
    for event in [*events(0, 1), step_of(2, 1, "a"), step_of(2, 2, "a")]:
        killed(event)
    killed.fail("killed")

    point = Point(
        run=killed.folder, source=killed.folder, number=1, config=config, clients=[],
        started="2026-01-01T00:00:00+00:00", seconds=1.0,
    )  # fmt: skip
    recorder = Recorder(config, say=lambda line: None, point=point)
    recorder.start()
    recorder.take_up()
    for event in events(2):
        recorder(event)
    recorder.finish()

    found = read(recorder.folder)
    assert [event.step for event in found.Scalars("train/loss/a")] == list(range(1, 2 * STEPS + 1))
    assert points(found, "eval/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert status(found) == 1
