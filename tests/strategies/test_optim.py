"""Schedules and seeds, which both sides of a cut must compute alike."""

from __future__ import annotations

import pytest
import torch

from conf.schema import TrainConfig
from strategies.optim import Progress, clipped_step, derive_seed, learning_rate


def rates(train: TrainConfig, rounds: int, steps: int, **kwargs: bool) -> list[float]:
    return [
        learning_rate(train, Progress(round=r, rounds=rounds, step=s, steps=steps), **kwargs)
        for r in range(1, rounds + 1)
        for s in range(steps)
    ]


def test_constant_linear_and_cosine() -> None:
    assert rates(TrainConfig(lr=1.0), 2, 2) == [1.0] * 4
    assert rates(TrainConfig(lr=1.0, schedule="linear"), 2, 2) == [1.0, 0.75, 0.5, 0.25]
    cosine = rates(TrainConfig(lr=1.0, schedule="cosine"), 2, 2)
    assert cosine == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_warm_up_spans_rounds_and_never_starts_at_zero() -> None:
    got = rates(TrainConfig(lr=1.0, warmup=0.5), 2, 4)

    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_the_trunk_may_have_its_own_rate() -> None:
    train = TrainConfig(lr=1.0, trunk_lr=0.1)

    assert rates(train, 1, 1) == [1.0]
    assert rates(train, 1, 1, trunk=True) == [0.1]


def test_clients_with_different_steps_stay_in_phase() -> None:
    train = TrainConfig(lr=1.0, schedule="linear")

    assert rates(train, 2, 2)[2] == rates(train, 2, 6)[6]


def test_clipping_uses_the_norm_of_all_parts() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])

    clipped_step(torch.optim.SGD([weight], lr=9.0), lr=1.0, norm=10.0, clip=1.0)

    assert weight.tolist() == pytest.approx([-0.3, -0.4], abs=1e-6)
    assert weight.grad is None


def test_seeds_differ_in_every_part_and_never_change() -> None:
    seeds = {derive_seed(*parts) for parts in [(0, 1), (1, 0), (0, "1", 0), (0, 11), (1, 1, "")]}

    assert len(seeds) == 5
    assert derive_seed(0, 1, "client-0") == 6584134741803672211
