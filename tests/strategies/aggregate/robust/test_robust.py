"""Robust aggregation against NumPy, Flower and the papers' promises; what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from torch import Tensor

import strategies.aggregate.robust
from conf.load import load_config
from conf.rules import ConfigError
from conf.schema import AggregationConfig, Config
from flower_app.check import check_names
from strategies.aggregate.robust.krum import choose
from strategies.aggregate.state import Contribution, GlobalState, Report

METHODS = ("median", "trimmed-mean", "krum", "multi-krum", "norm-bound")
CLIENTS = 9


def states(seed: int = 0) -> list[dict[str, Tensor]]:
    """Weights of one model, moved a little by each client."""
    generator = torch.Generator().manual_seed(seed)
    start = {"bottom.w": torch.randn(3, 4, generator=generator), "trunk.w": torch.randn(5)}
    return [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in start.items()}
        for _ in range(CLIENTS)
    ]


def aggregate(
    method: str, given: Sequence[dict[str, Tensor]], f: int = 2, bound: float = 1.0
) -> tuple[dict[str, Tensor], Report]:
    how = AggregationConfig(robust=method, byzantine=f, bound=bound)
    held = GlobalState(Config(aggregation=how))
    report = held.update(1, [Contribution(f"c{i}", 10.0 + i, s) for i, s in enumerate(given)])
    return held.tensors(lambda name: True, 8), report


@pytest.mark.parametrize("clients", [CLIENTS, CLIENTS - 1])
def test_median_and_trimmed_mean_are_those_of_numpy_and_flower(clients: int) -> None:
    given = states()[:clients]
    for name in given[0]:
        stack = np.stack([state[name].double().numpy() for state in given])
        median, trimmed = (aggregate(m, given)[0][name] for m in ("median", "trimmed-mean"))
        np.testing.assert_allclose(median.numpy(), np.median(stack, 0), rtol=1e-6)
        np.testing.assert_allclose(trimmed.numpy(), trim_mean(stack, 2.5 / clients), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 5])
def test_krum_chooses_as_flower_does_where_its_precision_reaches(count: int) -> None:
    given = states()
    contents = [
        RecordDict({"arrays": ArrayRecord({n: Array(t.numpy()) for n, t in s.items()})})
        for s in given
    ]
    want = select_multikrum(contents, num_malicious_nodes=2, num_nodes_to_select=count)
    assert choose(given, 2, count) == sorted(contents.index(one) for one in want)


def test_a_client_is_judged_by_its_ends_and_its_replica_together() -> None:
    """Judged tensor by tensor, an attacker that is the most usual of all in its ends gets them in
    whatever its replica holds."""
    given = states()
    given[4] = {
        "bottom.w": torch.stack([s["bottom.w"] for s in given]).mean(0),
        "trunk.w": given[4]["trunk.w"] + 100,
    }
    for method in ("krum", "multi-krum"):
        found, _ = aggregate(method, given)
        assert float((found["trunk.w"] - given[0]["trunk.w"]).abs().max()) < 2
        assert not torch.equal(found["bottom.w"], given[4]["bottom.w"])
    assert 4 not in choose(given, 2, 5)
    assert choose([{"bottom.w": s["bottom.w"]} for s in given], 2, 1) == [4]


@pytest.mark.parametrize("method", METHODS)
def test_f_clients_with_any_numbers_move_it_little(method: str) -> None:
    given = states()
    honest = torch.stack([s["bottom.w"] for s in given[2:]])
    for evil in (1e8, -1e8):
        bad = [{n: torch.full_like(t, evil) for n, t in s.items()} for s in given[:2]]
        found, report = aggregate(method, [*bad, *given[2:]])
        low, high = honest.min(0).values - 0.1, honest.max(0).values + 0.1
        assert bool(((found["bottom.w"] >= low) & (found["bottom.w"] <= high)).all())
        assert sorted(report.anomalies) == ["c0", "c1"]
        assert report.anomalies["c0"]["times"] > 1e6
    mean, _ = aggregate("none", [*bad, *given[2:]])
    assert float(mean["bottom.w"].abs().max()) > 1e6


def test_norm_bound_leaves_those_alone_who_are_within() -> None:
    given = states()
    found, _ = aggregate("norm-bound", given, bound=100.0)
    plain, report = aggregate("none", given)
    for name, tensor in plain.items():
        torch.testing.assert_close(found[name], tensor)
    assert report.anomalies == {}


def test_an_update_that_is_turned_round_stands_out_though_it_is_no_longer() -> None:
    start = states(1)[0]
    step = {n: torch.ones_like(t) for n, t in start.items()}
    given = [
        {n: t + (-1 if i == 3 else 1) * step[n] + 0.1 * s[n] for n, t in start.items()}
        for i, s in enumerate(states(2))
    ]
    _, report = aggregate("none", given)
    assert list(report.anomalies) == ["c3"]
    assert aggregate("none", given[2:4])[1].anomalies == {}  # of two, nobody is odd


@pytest.mark.parametrize(
    ("method", "least"),
    [("median", 5), ("trimmed-mean", 5), ("norm-bound", 5), ("krum", 7), ("multi-krum", 7)],
)
def test_too_few_clients_are_refused_before_a_run_and_in_a_round(method: str, least: int) -> None:
    how = [f"aggregation.robust={method}", "aggregation.byzantine=2"]
    config = load_config("demo", [*how, f"federation.min_clients={least - 1}"])
    with pytest.raises(ConfigError, match=f"needs {least} clients in every round.*min_clients="):
        check_names(config)
    check_names(load_config("demo", [*how, f"federation.min_clients={least}"]))
    with pytest.raises(ValueError, match=f"needs {least} clients, and {least - 1} answered"):
        aggregate(method, states()[: least - 1])
    aggregate(method, states()[:least])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["aggregation.lora=exact", "tuning.trunk=lora"], "aggregation.lora=exact.*ffa or factors"),
        (["aggregation.lora=svd", "tuning.trunk=lora"], "no common coordinates"),
        (["aggregation.optimizer=fedadam"], "server optimizer.*set aggregation.optimizer=fedavg"),
        (["train.strategy=merged", "train.sync=step"], "set train.outlier_clip"),
        (["train.strategy=merged", "aggregation.ends=local"], "has nothing to aggregate"),
    ],
)
def test_what_does_not_go_with_it_is_refused(values: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("demo", ["aggregation.robust=median", *values])


def test_a_new_file_is_a_new_method(tmp_path: Path) -> None:
    source = "from strategies.aggregate.robust.registry import Robust\n\n\nclass First(Robust):\n"
    source += '    name = "first"\n\n    def combine(self, states, shares, distances):\n'
    (tmp_path / "first.py").write_text(source + "        return dict(states[0])\n", "utf-8")
    strategies.aggregate.robust.__path__.append(str(tmp_path))
    try:
        given = states()
        assert torch.equal(aggregate("first", given)[0]["trunk.w"], given[0]["trunk.w"])
    finally:
        strategies.aggregate.robust.__path__.remove(str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'median'"):
        aggregate("medain", states())
