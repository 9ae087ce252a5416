"""What trackers are told of a run: its numbers by tag, and its hyper-parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from conf.load import to_dict
from conf.schema import Config
from flower_app.runs.lines import perplexity

STEP, ROUND = "train/step", "round"
"""Axes: a client's optimizer steps over all rounds, and rounds."""

ELSEWHERE = ("experiment", "output", "runtime", "tracking")
"""Sections that do not say what is computed; `config.yaml` has them."""


class Scalars(NamedTuple):
    """Numbers of one instant, by tag."""

    axis: str
    """`STEP` or `ROUND`."""
    step: int
    """Where on that axis."""
    values: dict[str, float]


def scalars(record: Mapping[str, Any]) -> Scalars | None:
    """Return what a record of the journal has to tell a tracker; None: nothing.

    A client's step is counted as if it had taken part in every round, so that all clients, and a
    run that was resumed, share an axis.
    """
    if record["kind"] == "step":
        place = (record["round"] - 1) * record["steps"] + record["step"]
        return Scalars(STEP, place, _numbers(_of_step(record)))
    if record["kind"] == "round":
        return Scalars(ROUND, record["round"], _numbers(_of_round(record)))
    return None


def hyperparameters(config: Config) -> dict[str, bool | int | float | str]:
    """Return the keys of a configuration that say what is computed; no scalar: as text."""
    told = {name: value for name, value in to_dict(config).items() if name not in ELSEWHERE}
    return dict(_flat(told, ""))


def _numbers(told: Iterator[tuple[str, float | None]]) -> dict[str, float]:
    """Without what the journal has as null: it was no finite number."""
    return {tag: value for tag, value in told if value is not None}


def _of_step(record: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    client, seconds = record["client"], record["seconds"]
    for name in ("loss", "grad_norm", "lr"):
        yield f"train/{name}/{client}", record[name]
    if (total := sum(seconds.values())) > 0:
        yield f"train/tokens_per_second/{client}", record["tokens"] / total
    for part, value in seconds.items():
        yield f"seconds/{part}/{client}", value


def _of_round(record: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    if (loss := (record["train"] or {}).get("loss")) is not None:
        yield "train/loss", loss
    if (loss := (record["evaluate"] or {}).get("loss")) is not None:
        yield "eval/loss", loss
        yield "eval/perplexity", perplexity(loss)
    if (loss := (record.get("central") or {}).get("loss")) is not None:
        yield "eval/central_loss", loss
        yield "eval/central_perplexity", perplexity(loss)
    for client, told in (record.get("per_client") or {}).items():
        if (loss := (told.get("evaluate") or {}).get("loss")) is not None:
            yield f"eval/loss/{client}", loss
    for name in ("tokens", "bytes_up", "bytes_down", "seconds"):
        yield f"round/{name}", record[name]
    yield "round/clients", len(record["clients"])
    yield "round/missing", len(record["missing"])
    if record["tokens"] and record["seconds"] > 0:
        yield "round/tokens_per_second", record["tokens"] / record["seconds"]
    for name, value in (record.get("memory") or {}).items():
        yield f"system/{name}", value


def _flat(value: Mapping[str, Any], stem: str) -> Iterator[tuple[str, bool | int | float | str]]:
    for name, each in value.items():
        if isinstance(each, Mapping) and each:
            yield from _flat(each, f"{stem}{name}.")
        elif isinstance(each, bool | int | float | str):
            yield stem + name, each
        else:
            yield stem + name, str(each)
