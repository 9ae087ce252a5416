"""Global sampling: the server fixes what a step learns from, over all clients together."""

from __future__ import annotations

import numpy as np
import pytest

from conf.schema import TrainConfig
from strategies.rounds.roster import Profile, draw_batches


def cohort(*examples: int) -> list[Profile]:
    return [
        Profile(node=i, client=f"client-{i}", bottom=1, top=1, rank=8, examples=count)
        for i, count in enumerate(examples)
    ]


def settings(batch: int, **changes: int) -> TrainConfig:
    values = {"local_epochs": 1, "global_batch": batch, **changes}
    return TrainConfig(strategy="merged", **values)  # type: ignore[arg-type]


def test_every_step_has_the_global_batch_and_an_epoch_has_every_example_once() -> None:
    drawn = draw_batches(cohort(5, 20, 75), settings(8), seed=0, number=1)

    table = np.array(list(drawn.values()))
    assert table.sum(axis=0).tolist() == [8] * 12 + [4]
    assert table.sum(axis=1).tolist() == [5, 20, 75]


def test_two_epochs_begin_anew() -> None:
    drawn = draw_batches(cohort(5, 20, 75), settings(8, local_epochs=2), seed=0, number=1)

    table = np.array(list(drawn.values()))
    assert table.sum(axis=1).tolist() == [10, 40, 150]
    assert table[:, :13].sum(axis=1).tolist() == [5, 20, 75]


def test_local_steps_count_steps_not_epochs() -> None:
    drawn = draw_batches(cohort(3, 3), settings(4, local_steps=5), seed=0, number=1)

    assert all(len(sizes) == 5 for sizes in drawn.values())


def test_draws_are_in_proportion_to_the_data() -> None:
    """The first step's counts, over many seeds: hypergeometric, not a fixed apportionment."""
    first = np.array(
        [
            [s[0] for s in draw_batches(cohort(10, 30, 60), settings(10), seed, 1).values()]
            for seed in range(2000)
        ]
    )

    assert first.mean(axis=0) == pytest.approx([1, 3, 6], abs=0.12)
    assert first[:, 0].var() == pytest.approx(10 * 0.1 * 0.9 * 90 / 99, rel=0.15)


def test_draws_repeat_and_differ_by_round() -> None:
    who, train = cohort(10, 30, 60), settings(10)

    assert draw_batches(who, train, 3, 1) == draw_batches(who, train, 3, 1)
    assert draw_batches(who, train, 3, 1) != draw_batches(who, train, 3, 2)
    assert draw_batches(who, train, 3, 1) != draw_batches(who, train, 4, 1)


def test_a_cohort_without_data_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no client of the cohort has an example"):
        draw_batches(cohort(0, 0), settings(4), 0, 1)
