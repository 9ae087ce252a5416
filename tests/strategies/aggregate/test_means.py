"""Row 14: the average equals the weighted mean worked out by hand."""

from __future__ import annotations

import pytest
import torch

from strategies.aggregate.means import weighted_mean


def test_the_mean_is_weighted() -> None:
    states = [
        {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)},
        {"w": torch.tensor([3.0, -2.0]), "b": torch.tensor(0.0)},
    ]

    mean = weighted_mean(states, [30, 10])

    assert mean["w"].tolist() == [1.5, 1.0]
    assert mean["b"].item() == 3.0
    assert states[0]["w"].tolist() == [1.0, 2.0]


def test_dtype_is_kept_and_the_sum_is_not_done_in_it() -> None:
    states = [{"w": torch.full((1,), 1.0, dtype=torch.bfloat16)} for _ in range(1000)]

    mean = weighted_mean(states, [1.0] * 1000)

    assert mean["w"].dtype == torch.bfloat16
    assert mean["w"].item() == 1.0


def test_another_dtype_can_be_asked_for() -> None:
    states = [{"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 1.0078125)]

    mean = weighted_mean(states, [1, 1], dtype=torch.float64)

    assert mean["w"].dtype == torch.float64
    assert mean["w"].item() == 1.00390625


def test_whoever_does_not_fit_is_named() -> None:
    good, bad = {"a": torch.ones(2)}, {"a": torch.tensor([1.0, float("inf")])}

    for other in (bad, {"b": torch.ones(2)}, {"a": torch.ones(3)}):
        with pytest.raises(ValueError, match="carol"):
            weighted_mean([good, other, good], [1, 1, 1], who=["alice", "carol", "bob"])


@pytest.mark.parametrize(
    ("states", "weights", "word"),
    [
        ([], [], "nothing to average"),
        ([{"a": torch.ones(1)}], [1, 2], "1 states but 2 weights"),
        ([{"a": torch.ones(1)}], [0], "not all zero"),
        ([{"a": torch.ones(1)}] * 2, [1, -1], ">= 0"),
        ([{"a": torch.ones(1)}] * 2, [3, -1], ">= 0"),
        ([{"a": torch.ones(1)}], [float("nan")], "finite"),
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], [1, 1], "differ in names"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], [1, 1], r"shape \(2,\)"),
        ([{"a": torch.tensor([float("nan")])}], [1], "not finite"),
    ],
)
def test_what_cannot_be_averaged_is_refused(states: list, weights: list, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        weighted_mean(states, weights)
