"""A stranger's aggregator is one new file in the folder, named nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import strategies.aggregate
from conf.rules import ConfigError
from conf.schema import AggregationConfig, Config
from strategies.aggregate.aggregator import find_aggregator
from strategies.aggregate.state import Contribution, GlobalState

MEDIAN = """
import torch
from strategies.aggregate.aggregator import Aggregator

class Median(Aggregator):
    name = "median"
    def combine(self, states, shares, who, dtype=None):
        return {n: torch.stack([s[n] for s in states]).median(0).values for n in states[0]}
"""


@pytest.fixture
def _median(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "median.py").write_text(MEDIAN, encoding="utf-8")
    strategies.aggregate.__path__.append(str(tmp_path))
    yield
    strategies.aggregate.__path__.remove(str(tmp_path))
    sys.modules.pop("strategies.aggregate.median", None)


@pytest.mark.usefixtures("_median")
def test_a_new_file_is_a_new_aggregator() -> None:
    state = GlobalState(Config(aggregation=AggregationConfig(lora="median")))

    answers = {"a": 1.0, "b": 2.0, "c": 900.0}
    state.update(1, [Contribution(c, 1.0, {"w": torch.tensor([v])}) for c, v in answers.items()])

    assert state.tensors(lambda name: True, 8)["w"].tolist() == [2.0]


def test_a_name_that_nobody_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="exact, factors, ffa, svd.*did you mean 'exact'"):
        find_aggregator("exat")
