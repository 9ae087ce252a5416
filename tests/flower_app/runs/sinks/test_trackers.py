"""Trackio, W&B and MLflow themselves, as far as they go without a network; skipped without them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config
from flower_app.runs.recorder import Recorder
from flower_app.runs.resume import Point
from tests.flower_app.runs.sinks.helpers import STEPS, config_for, events, loss, run


@pytest.fixture(autouse=True)
def _nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def go_on(config: Config, folder: Path, *rounds: int) -> list[str]:
    """Resume a run of one round."""
    lines: list[str] = []
    point = Point(
        run=folder, source=folder, number=1, config=config, clients=[],
        started="2026-01-01T00:00:00+00:00", seconds=1.0,
    )  # fmt: skip
    recorder = Recorder(config, say=lines.append, point=point)
    recorder.start()
    recorder.take_up()
    for event in events(*rounds):
        recorder(event)
    recorder.finish()
    return lines


def test_mlflow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mlflow = pytest.importorskip("mlflow")
    config = config_for(tmp_path, "mlflow", project="mine")
    folder, lines = run(config, 0, 1)
    go_on(config, folder, 2)

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == folder.name
    assert found.info.status == "FINISHED"
    assert found.data.params["train.lr"] == "0.01"
    assert found.data.tags["graft.run_folder"] == str(folder)

    def points(key: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, key))

    assert points("eval/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    want = [(STEPS * (n - 1) + s, loss(n, s, "a")) for n in (1, 2) for s in range(1, STEPS + 1)]
    assert points("train/loss/a") == want
    assert any("MLflow: run" in line for line in lines)
    assert not [r for r in caplog.records if "tracking.sinks" in r.getMessage()]


def test_wandb_offline_without_an_account(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    config = config_for(tmp_path, "wandb", project="mine")
    folder, lines = run(config, 0, 1)
    again = go_on(config, folder, 2)

    first, second = (logged(path) for path in sorted((folder / "wandb").glob("offline-run-*")))
    assert first["run"].display_name == folder.name
    assert first["run"].project == "mine"
    assert first["run"].run_id == second["run"].run_id
    assert first["config"]["train.lr"] == 0.01
    assert first["config"]["run_folder"] == str(folder)
    rows = [*first["rows"], *second["rows"]]
    found = [(row["round"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    assert found == [(0, 3.0), (1, 2.0), (2, 1.0)]
    steps = [(row["train/step"], row["train/loss/b"]) for row in rows if "train/loss/b" in row]
    want = [(STEPS * (n - 1) + s, loss(n, s, "b")) for n in (1, 2) for s in range(1, STEPS + 1)]
    assert steps == want
    assert any("`wandb sync " in line for line in lines + again)
    assert not [r for r in caplog.records if "tracking.sinks" in r.getMessage()]


def test_wandb_online_without_an_account_is_told_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    folder, _ = run(config_for(tmp_path, "wandb"), 0, 1)
    assert "nobody is logged in: set WANDB_API_KEY" in caplog.text
    assert (folder / "summary.json").exists()


def logged(folder: Path) -> dict[str, Any]:
    """What is in the file that `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2 as pb

    (file,) = folder.glob("*.wandb")
    found = dict[str, Any](rows=[], config={})
    for data in log_records(file.read_bytes()):
        record = pb.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {
                each.key: json.loads(each.value_json) for each in record.run.config.update
            }
        elif kind == "history":
            row = {
                each.key or ".".join(each.nested_key): json.loads(each.value_json)
                for each in record.history.item
            }
            found["rows"].append(row)
    return found


def log_records(text: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, as W&B writes it: blocks of 32 KiB, after 7 bytes."""
    place, part = 7, b""
    while place + 7 <= len(text):
        if (left := -place % 2**15) < 7:  # too little for a record's head: filled with zeros
            place += left
            continue
        length, kind = struct.unpack_from("<HB", text, place + 4)
        part += text[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def test_trackio(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackio = pytest.importorskip("trackio")
    config = config_for(tmp_path, "trackio", project="mine")
    folder, _ = run(config, 0, 1)
    go_on(config, folder, 2)

    from trackio.sqlite_storage import SQLiteStorage

    (found,) = trackio.Api().runs("mine")
    assert found.name == folder.name
    assert found.config["train.lr"] == 0.01
    assert found.config["run_folder"] == str(folder)
    values = SQLiteStorage.get_logs("mine", folder.name)
    held = [(row["step"], row["eval/loss"]) for row in values if "eval/loss" in row]
    assert held == [(0, 3.0), (1, 2.0), (2, 1.0)]
    steps = [(row["step"], row["train/loss/a"]) for row in values if "train/loss/a" in row]
    want = [(STEPS * (n - 1) + s, loss(n, s, "a")) for n in (1, 2) for s in range(1, STEPS + 1)]
    assert steps == want
    assert not [r for r in caplog.records if "tracking.sinks" in r.getMessage()]
