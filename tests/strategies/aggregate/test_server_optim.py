"""Server optimizers equal the formulas written by hand, over rounds, and can be taken back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conf.schema import AggregationConfig
from strategies.aggregate.server_optim import ServerOptimizer, build_server_optimizer

Formula = Callable[[int, float, dict[str, float]], float]
LR, MOMENTUM, BETAS, TAU = 0.3, 0.8, (0.7, 0.95), 1e-2


def settings(optimizer: str) -> AggregationConfig:
    return AggregationConfig(optimizer=optimizer, lr=LR, momentum=MOMENTUM, betas=BETAS, tau=TAU)


def fedavgm(round: int, delta: float, memory: dict[str, float]) -> float:
    memory["m"] = MOMENTUM * memory.get("m", 0.0) + delta
    return LR * memory["m"]


def fedadam(round: int, delta: float, memory: dict[str, float]) -> float:
    one, two = BETAS
    memory["m"] = one * memory.get("m", 0.0) + (1 - one) * delta
    memory["v"] = two * memory.get("v", 0.0) + (1 - two) * delta**2
    corrected = LR * math.sqrt(1 - two ** (round + 1)) / (1 - one ** (round + 1))
    return corrected * memory["m"] / (math.sqrt(memory["v"]) + TAU)


def fedyogi(round: int, delta: float, memory: dict[str, float]) -> float:
    one, two = BETAS
    v = memory.get("v", 0.0)
    sign = (v > delta**2) - (v < delta**2)
    memory["m"] = one * memory.get("m", 0.0) + (1 - one) * delta
    memory["v"] = v - (1 - two) * delta**2 * sign
    return LR * memory["m"] / (math.sqrt(memory["v"]) + TAU)


FORMULAS: dict[str, Formula] = {"fedavgm": fedavgm, "fedadam": fedadam, "fedyogi": fedyogi}


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Named out of order, of unlike shapes, and one without dimensions."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"z": (2, 3), "a": (4,), "m": ()}
    return {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}


def by_hand(formula: Formula, start: dict[str, Tensor], means: list[dict[str, Tensor]]) -> dict:
    """Element by element, in Python floats."""
    found = {}
    for name, tensor in start.items():
        values = []
        for index, value in enumerate(tensor.flatten().tolist()):
            memory: dict[str, float] = {}
            for round, mean in enumerate(means, start=1):
                value += formula(round, mean[name].flatten()[index].item() - value, memory)
            values.append(value)
        found[name] = torch.tensor(values, dtype=torch.float64).reshape(tensor.shape)
    return found


def run(optimizer: ServerOptimizer, current: dict, means: list, first: int = 1) -> dict:
    for round, mean in enumerate(means, start=first):
        current = optimizer.step(round, current, mean)
    return current


@pytest.mark.parametrize("name", FORMULAS)
def test_three_rounds_equal_the_formula(name: str) -> None:
    start, means = tensors(0), [tensors(seed) for seed in (1, 2, 3)]

    moved = run(ServerOptimizer(settings(name)), start, means)

    for key, expected in by_hand(FORMULAS[name], start, means).items():
        torch.testing.assert_close(moved[key], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_order_of_names_does_not_matter(name: str) -> None:
    start, means = tensors(0), [tensors(seed) for seed in (1, 2)]
    turned = [dict(reversed(list(mean.items()))) for mean in means]

    one = run(ServerOptimizer(settings(name)), start, means)
    other = run(ServerOptimizer(settings(name)), start, turned)

    assert all(torch.equal(one[key], other[key]) for key in start)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_state_that_is_loaded_goes_on_as_if_nothing_happened(name: str) -> None:
    start, means = tensors(0), [tensors(seed) for seed in (1, 2, 3)]
    whole = ServerOptimizer(settings(name))
    after_one = run(whole, start, means[:1])
    kept = whole.state_dict()
    expected = run(whole, after_one, means[1:], first=2)
    other = ServerOptimizer(settings(name))

    other.load_state_dict(kept)
    resumed = run(other, after_one, means[1:], first=2)
    whole.load_state_dict(kept)
    again = run(whole, after_one, means[1:], first=2)

    assert {key.split("/")[1] for key in kept} == set(start)
    assert all(torch.equal(expected[key], resumed[key]) for key in start)
    assert all(torch.equal(expected[key], again[key]) for key in start)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_empty_state_forgets(name: str) -> None:
    start, means = tensors(0), [tensors(1)]
    optimizer = ServerOptimizer(settings(name))
    empty = optimizer.state_dict()
    expected = run(optimizer, start, means)

    optimizer.load_state_dict(empty)
    again = run(optimizer, start, means)

    assert empty == {}
    assert all(torch.equal(expected[key], again[key]) for key in start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept_and_the_arithmetic_is_finer(dtype: torch.dtype) -> None:
    start, mean = {"w": torch.ones(3, dtype=dtype)}, {"w": torch.full((3,), 1.001).double()}
    optimizer = ServerOptimizer(AggregationConfig(optimizer="fedavgm", lr=100.0))

    moved = optimizer.step(1, start, mean)

    assert moved["w"].dtype == dtype
    assert moved["w"].float() == pytest.approx([1.1] * 3, rel=4e-3)
    assert start["w"].tolist() == [1.0] * 3


def test_names_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\['b'\]"):
        ServerOptimizer(settings("fedadam")).step(
            1, {"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}
        )


def test_fedavg_needs_no_optimizer() -> None:
    assert build_server_optimizer(settings("fedavg")) is None
