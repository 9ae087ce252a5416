"""What a client says is checked, against what is known of it, before any of it counts."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from conf.schema import AggregationConfig, Config, DataConfig
from strategies.records import to_arrays
from strategies.rounds.answers import (
    COUNTERS,
    Bounds,
    Profile,
    Seen,
    read_evaluated,
    read_first_tensors,
    read_profile,
    read_trained,
)

METRICS = {**dict.fromkeys(COUNTERS, 1), "num-tokens": 5, "loss": 1.0}
A, B = "layers.0.q.lora_A.default.weight", "layers.0.q.lora_B.default.weight"
FORM = {A: (2, 3), B: (4, 2)}
SEEN = Seen(tokens=5, steps=1)
PROFILE = Profile(node=7, client="c", bottom=1, top=1, rank=2)
BOUNDS = Bounds(blocks=4, width=16, own_cut=True)
TOLD: dict[str, Any] = {
    "cut-bottom": 1, "cut-top": 1, "lora-rank": 8, "examples": 3, "public-key": bytes(range(32)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def tensors(**changes: torch.Tensor | None) -> ArrayRecord:
    """The tensors that are due; `a` and `b` change one, None takes it out, other names add one."""
    names = {"a": A, "b": B}
    held: dict[str, Any] = {A: torch.ones(2, 3), B: torch.ones(4, 2)}
    held |= {names.get(name, name): tensor for name, tensor in changes.items()}
    return to_arrays({name: tensor for name, tensor in held.items() if tensor is not None})


def raw(data: bytes, **changes: Any) -> ArrayRecord:
    """Bytes that claim to be factor A."""
    record = tensors()
    record[A] = Array(
        **{"dtype": "float32", "shape": (2, 3), "stype": "numpy.ndarray", **changes, "data": data}
    )
    return record


def npy(array: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def huge_header() -> bytes:
    """The header of an array of petabytes, and nothing behind it."""
    out = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (10**15,)}
    np.lib.format.write_array_header_1_0(out, shape)
    return out.getvalue()


def reply(**changes: Any) -> Message:
    records: dict[str, Any] = {
        "arrays": tensors(),
        "metrics": MetricRecord(dict(METRICS)),
        "outcome": ConfigRecord({"client": "c", "error": ""}),
        **changes,
    }
    content = RecordDict({name: record for name, record in records.items() if record is not None})
    return Message(content, reply_to=Message(RecordDict(), 1, "train"))


def metrics(**changes: Any) -> MetricRecord:
    return MetricRecord({**METRICS, **{k.replace("_", "-"): v for k, v in changes.items()}})


def test_a_good_answer_is_read() -> None:
    answer = read_trained(reply(), PROFILE, "k", FORM, SEEN)

    assert (answer.key, answer.client, answer.metrics) == ("k", "c", METRICS)
    assert answer.state[A].tolist() == torch.ones(2, 3).tolist()


def test_strided_tensors_arrive_as_they_are() -> None:
    """NumPy writes a transposed matrix in Fortran's order."""
    b = torch.arange(8.0).reshape(2, 4).T

    answer = read_trained(reply(arrays=tensors(b=b)), PROFILE, "k", FORM, SEEN)

    assert torch.equal(answer.state[B], b)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": None}, "no record 'metrics'"),
        ({"outcome": None}, "no record 'outcome'"),
        ({"arrays": None}, "no record 'arrays'"),
        ({"outcome": ConfigRecord({"error": ""})}, "called None"),
        ({"outcome": ConfigRecord({"client": 3, "error": ""})}, "called 3"),
        ({"outcome": ConfigRecord({"client": "c", "error": 1})}, "error=1"),
        ({"outcome": ConfigRecord({"client": "d", "error": ""})}, "answers as 'd' and was 'c'"),
        ({"outcome": ConfigRecord({"client": "c", "error": "no data"})}, "^no data$"),
        ({"outcome": ConfigRecord({"client": "c", "error": "a\nb\x1b[2J"})}, r"^a b \[2J$"),
        ({"outcome": ConfigRecord({"client": "c", "error": "x" * 10**5})}, r"^x{500}\.\.\.$"),
        # Counters: those of training are the trunk's own.
        ({"metrics": MetricRecord({"loss": 1.0})}, "num-tokens=None"),
        ({"metrics": metrics(loss=[1.0, 2.0])}, r"loss=\[1.0, 2.0\]"),
        ({"metrics": metrics(loss=float("nan"))}, "loss=nan"),
        ({"metrics": metrics(loss=1e30)}, r"loss=1e\+30"),
        ({"metrics": metrics(num_tokens=0)}, "no token"),
        ({"metrics": metrics(num_tokens=6)}, "num-tokens=6 of training, the trunk has applied 5"),
        ({"metrics": metrics(steps=2)}, "steps=2 of training, the trunk has applied 1"),
        ({"metrics": metrics(steps=-1)}, "steps=-1"),
        ({"metrics": metrics(bytes_up=1.7e308)}, r"bytes-up=1.7e\+308"),
        ({"metrics": metrics(peak_memory_mb=float("inf"))}, "peak-memory-mb=inf"),
        ({"metrics": metrics(peak_memory_mb=1e9)}, r"peak-memory-mb=1e\+09"),
        ({"metrics": metrics(seconds_trunk=-1.0)}, "seconds-trunk=-1"),
        ({"metrics": metrics(seconds_network=float("nan"))}, "seconds-network=nan"),
        ({"metrics": metrics(seconds_top=1e12)}, r"seconds-top=1e\+12"),
        # Tensors: those that this client trains, and no others.
        ({"arrays": ArrayRecord()}, f"lacks '{A}'.* 2 are missing or unknown"),
        ({"arrays": tensors(b=None)}, f"lacks '{B}'"),
        ({"arrays": tensors(**{"model.trunk": torch.ones(2)})}, "holds 'model.trunk'"),
        ({"arrays": tensors(**{"layers.0.q.residual": torch.ones(4, 3)})}, "holds 'layers.0.q.res"),
        ({"arrays": tensors(a=torch.ones(5, 3), b=torch.ones(4, 5))}, r"shape \(5, 3\), \(2, 3\)"),
        ({"arrays": tensors(b=torch.ones(4, 3))}, r"shape \(4, 3\), \(4, 2\) is due"),
        ({"arrays": tensors(a=torch.ones(6))}, r"shape \(6,\), \(2, 3\) is due"),
        ({"arrays": tensors(a=torch.ones(0, 3))}, r"shape \(0, 3\)"),
        ({"arrays": tensors(a=torch.ones(2, 3).double())}, "is float64, not float32"),
        ({"arrays": tensors(a=torch.ones(2, 3, dtype=torch.int8))}, "is int8"),
        ({"arrays": tensors(a=torch.full((2, 3), torch.nan))}, "values that are not finite"),
        ({"arrays": tensors(a=torch.full((2, 3), 3e38))}, r"holds 3e\+38; up to 1e\+09"),
        # Bytes that are no such array.
        ({"arrays": raw(b"")}, "no array as NumPy writes it"),
        ({"arrays": raw(b"PK\x03\x04 no archive")}, "no array as NumPy writes it"),
        ({"arrays": raw(huge_header())}, "shape"),
        ({"arrays": raw(npy(np.ones((2, 3), "<f4"))[:-4])}, "has 20 bytes"),
        ({"arrays": raw(npy(np.ones((2, 3), "<f4")) + b"more")}, "has 28 bytes"),
        ({"arrays": raw(npy(np.ones((2, 3), ">f4")))}, "is >f4, not float32"),
        ({"arrays": raw(npy(np.ones(6, [("x", "<f4")])))}, "no array as NumPy writes it"),
        ({"arrays": raw(npy(np.array([{}, None], object)))}, "is object"),
        ({"arrays": raw(npy(np.ones((2, 3), "<f4")).replace(b"<f4", b"<q9"))}, "'<q9'"),
        ({"arrays": raw(npy(np.ones((2, 3), "<f4")).replace(b"3)", b"9)"))}, r"shape \(2, 9\)"),
    ],
)  # fmt: skip
def test_what_does_not_hold_together_is_refused_in_words(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        read_trained(reply(**changes), PROFILE, "k", FORM, SEEN)


def test_flowers_own_errors_are_reasons() -> None:
    gone = Message(Error(code=3), reply_to=Message(RecordDict(), 1, "train"))

    with pytest.raises(ValueError, match="Flower's error 3"):
        read_trained(gone, PROFILE, "k", FORM, SEEN)


def test_held_out_tokens_are_bounded_by_what_the_trunk_has_seen() -> None:
    """Prompts and padding do not count, so fewer than it saw are right; more are a lie."""
    assert read_evaluated(reply(arrays=None), PROFILE, "k", Seen(tokens=9, steps=0)).state == {}

    with pytest.raises(ValueError, match="5 held-out tokens, the trunk has seen 4"):
        read_evaluated(reply(arrays=None), PROFILE, "k", Seen(tokens=4, steps=0))


@pytest.mark.parametrize(
    "changes",
    [
        {"arrays": None},
        {"arrays": raw(b"")},
        {"arrays": tensors(b=torch.ones(4, 3))},
        {"outcome": None},
        {"outcome": ConfigRecord({"client": "d", "error": ""})},
    ],
)
def test_first_tensors_are_checked_like_any_others(changes: dict[str, Any]) -> None:
    assert read_first_tensors(reply(), PROFILE, FORM)[A].shape == (2, 3)

    with pytest.raises(ValueError):
        read_first_tensors(reply(**changes), PROFILE, FORM)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut-bottom": 0}, "cut-bottom=0; 1 to 3 can be"),
        ({"cut-bottom": 2, "cut-top": 2}, "the model has 4 blocks"),
        ({"cut-top": 10**6}, "cut-top=1000000"),
        ({"cut-bottom": True}, "cut-bottom=True"),
        ({"lora-rank": 0}, "lora-rank=0"),
        ({"lora-rank": 60_000}, "lora-rank=60000; 1 to 16 can be"),
        ({"lora-rank": [8, 8]}, r"lora-rank=\[8, 8\]"),
        ({"examples": 21}, "examples=21; 0 to 20 can be"),
        ({"examples": 1.5}, "examples=1.5"),
        ({"public-key": bytes(32)}, "shows no key"),  # a weak point
        ({"public-key": "text"}, "shows no key"),
        ({"client": "x" * 200}, "it says it is called 'xxx"),
        ({"client": "a\nb"}, r"it says it is called 'a\\nb'"),
    ],
)
def test_a_profile_says_what_can_be_in_this_run(changes: dict[str, Any], words: str) -> None:
    config = Config(aggregation=AggregationConfig(lora="exact"), data=DataConfig(max_examples=20))

    with pytest.raises(ValueError, match=words):
        read_profile(7, profile_reply(**changes), config, BOUNDS)


def test_ranks_and_cuts_are_the_runs_own_where_they_cannot_differ() -> None:
    narrow = Bounds(blocks=4, width=16, own_cut=False)
    assert read_profile(7, profile_reply(), Config(), narrow).rank == 8

    with pytest.raises(ValueError, match="lora-rank=4; 8 to 8"):
        read_profile(7, profile_reply(**{"lora-rank": 4}), Config(), narrow)
    with pytest.raises(ValueError, match="cut-top=2; 1 to 1"):
        read_profile(7, profile_reply(**{"cut-top": 2}), Config(), narrow)


def profile_reply(**changes: Any) -> Message:
    told = {"client": "c", "error": "", **TOLD, **changes}
    outcome = {key: told.pop(key) for key in ("client", "error")}
    return reply(outcome=ConfigRecord(outcome), profile=ConfigRecord(told), arrays=None)
