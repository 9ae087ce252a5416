"""What a client answers is checked before anything is averaged (rows 14 and 15)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from strategies.records import to_arrays
from strategies.rounds.answers import Answer, mismatches, read_answer

METRICS = {"num-tokens": 5, "loss": 1.0, "steps": 1, "bytes-up": 1, "bytes-down": 1}


@pytest.fixture(autouse=True)
def _flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def raw_array(data: bytes) -> ArrayRecord:
    """Bytes that claim to be an array."""
    return ArrayRecord({"w": Array("float32", (2,), "numpy.ndarray", data)})


def huge_header() -> bytes:
    """The header of an array of petabytes, and nothing behind it."""
    out = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (10**15,)}
    np.lib.format.write_array_header_1_0(out, shape)
    return out.getvalue()


def reply(**changes: Any) -> Message:
    records: dict[str, Any] = {
        "arrays": to_arrays({"w": torch.ones(2)}),
        "metrics": MetricRecord(dict(METRICS)),
        "outcome": ConfigRecord({"client": "c", "error": ""}),
        **changes,
    }
    content = RecordDict({name: record for name, record in records.items() if record is not None})
    question = Message(RecordDict(), 1, "train")
    return Message(content, reply_to=question)


def test_a_good_answer_is_read() -> None:
    answer = read_answer("k", reply(), "node 1")

    assert (answer.client, answer.error) == ("c", "")
    assert answer.state["w"].tolist() == [1.0, 1.0]
    assert answer.metrics == METRICS


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"metrics": None}, "metrics"),
        ({"outcome": None}, "outcome"),
        ({"outcome": ConfigRecord({"error": ""})}, "client"),
        ({"metrics": MetricRecord({"loss": 1.0})}, "num-tokens"),
        ({"metrics": MetricRecord({**METRICS, "loss": float("nan")})}, "loss=nan"),
        ({"metrics": MetricRecord({**METRICS, "num-tokens": 0})}, "no token"),
        ({"arrays": to_arrays({"w": torch.tensor([float("nan")])})}, "'w' holds"),
        ({"outcome": ConfigRecord({"client": "c", "error": "no data"})}, "no data"),
        # What one client makes up must cost itself the round, and nobody else the run.
        ({"metrics": MetricRecord({**METRICS, "bytes-up": 1.7e308})}, "bytes-up=1.7e+308"),
        ({"metrics": MetricRecord({**METRICS, "steps": -1})}, "steps=-1"),
        ({"arrays": to_arrays({"w": torch.ones(2).double() * 1e300})}, "is torch.float64"),
        ({"arrays": to_arrays({"w": torch.ones(2, dtype=torch.int8)})}, "is torch.int8"),
        ({"arrays": raw_array(b"")}, "not one of Graft's"),
        ({"arrays": raw_array(b"PK\x03\x04 no archive")}, "not one of Graft's"),
        ({"arrays": raw_array(huge_header())}, "not one of Graft's"),
    ],
)
def test_what_does_not_hold_together_becomes_an_error(changes: dict[str, Any], word: str) -> None:
    assert word in read_answer("k", reply(**changes), "node 1").error


def answers(**shapes: tuple[int, ...]) -> list[Answer]:
    return [
        Answer(key=key, client=key, state={"w": torch.ones(shape)}) for key, shape in shapes.items()
    ]


def test_the_odd_one_out_is_named_and_the_others_are_kept() -> None:
    assert set(mismatches(answers(a=(2,), b=(3,), c=(2,)), {})) == {"b"}
    assert set(mismatches(answers(a=(2,), b=(3,), c=(2,)), {"w": torch.ones(3)})) == {"a", "c"}
    assert mismatches([], {}) == {}
