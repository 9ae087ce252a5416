"""A trunk policy is one new file in its folder, named nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from conf.load import load_config
from conf.rules import ConfigError
from conf.schema import TrainConfig
from simulations.launch.preflight import check_run
from strategies.engine import policies as folder
from strategies.engine.engine import TrunkEngine
from strategies.engine.policies.registry import find_policy, policies
from tests.strategies.helpers import largest_difference, random_steps, tiny_model, train_split, twin

TOY = '''
"""The `first-half` policy: the trunk learns in the first half of a round's steps only."""

from strategies.engine.lane import OwnLane
from strategies.engine.policy import Policy
from strategies.optim import build_optimizer, trainable


class FirstHalf(Policy):
    name = "first-half"

    def lane(self, member):
        parameters = trainable(self.trunk)
        optimizer = build_optimizer(parameters, self.train)
        return _Lane(
            self.trunk, member, self.bench, optimizer=optimizer, parameters=parameters
        )


class _Lane(OwnLane):
    def step(self, step, square, tokens, gradients):
        if step >= self.member.steps / 2:
            self._optimizer.zero_grad()
        return super().step(step, square, tokens, gradients)
'''


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[None]:
    """A folder of somebody else's that the package looks into, too."""
    (tmp_path / "toy_first_half.py").write_text(TOY)
    folder.__path__.append(str(tmp_path))
    yield
    folder.__path__.remove(str(tmp_path))
    sys.modules.pop(f"{folder.__name__}.toy_first_half", None)


def test_the_policies_that_ship() -> None:
    assert list(policies()) == ["merged", "splitfed-v1", "splitfed-v2"]
    assert [name for name, kind in policies().items() if kind.replicates] == ["splitfed-v1"]


@pytest.mark.usefixtures("stranger")
def test_a_strangers_policy_trains_from_one_file() -> None:
    train = load_config("demo", "train.strategy=first-half train.optimizer=sgd train.lr=0.1").train
    short, long, ends = tiny_model(), tiny_model(), tiny_model()
    steps = random_steps(4, seed=1)

    train_split(long, steps, train)
    train_split(short, steps[:1], train)

    assert largest_difference(long, short) > 0
    trained = train_split(ends, steps, train)
    assert trained.losses[-1] < trained.losses[0]
    frozen = twin(tiny_model())
    train_split(frozen, steps, TrainConfig(optimizer="sgd", lr=0.1))
    assert largest_difference(frozen, ends) > 1e-5, "the other half is not learned from"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("splitfed-v3", "one of merged, splitfed-v1, splitfed-v2, got 'splitfed-v3'; did you mean"),
        ("fedavg", "one of merged, splitfed-v1, splitfed-v2, got 'fedavg'$"),
    ],
)
def test_a_policy_that_nobody_brings_is_refused_before_the_run(name: str, words: str) -> None:
    assert load_config("demo", f"train.strategy={name}").train.strategy == name
    with pytest.raises(ValueError, match=words):
        find_policy(name)
    with pytest.raises(ValueError, match=words):
        check_run("demo", f"train.strategy={name}")
    with pytest.raises(ValueError, match=words):
        TrunkEngine(torch.nn.Linear(4, 4), hidden_size=4, train=TrainConfig(strategy=name))


def test_what_is_no_name_is_refused_by_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"train.strategy must be a name of letters"):
        load_config("demo", ["train.strategy=Split Fed"])
