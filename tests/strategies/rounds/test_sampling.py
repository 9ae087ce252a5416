"""Who is drawn for a round, and what of a global batch each client gives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from conf.schema import Config, FederationConfig, TrainConfig
from strategies.rounds.answers import Profile
from strategies.rounds.sampling import choose, draw, draw_batches, quorum, sizes


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


def profiles(*examples: int) -> list[Profile]:
    return [
        Profile(node=9 - i, client=f"c{i}", bottom=1, top=1, rank=8, examples=count)
        for i, count in enumerate(examples)
    ]


def drawn(draw: Callable[[int], list[Profile]], times: int) -> Counter[str]:
    return Counter(profile.client for seed in range(times) for profile in draw(seed))


def test_weighted_draws_follow_the_examples() -> None:
    """One of four: shares of the examples. Two of three: as if drawn one after the other."""
    some = profiles(10, 20, 30, 40)
    count = drawn(lambda seed: choose(some, 1, seed, weighted=True), 8000)
    shares = [count[p.client] / 8000 for p in some]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)

    pair = profiles(1, 1, 2)
    count = drawn(lambda seed: choose(pair, 2, seed, weighted=True), 8000)
    # c2 is first (1/2), or second after c0 or c1 (1/4 each, then 2 of 3 are left): 5/6.
    assert count["c2"] / 8000 == pytest.approx(5 / 6, abs=0.02)
    assert count["c0"] / 8000 == pytest.approx(7 / 12, abs=0.02)


def test_uniform_draws_ignore_the_examples() -> None:
    some = profiles(1, 1000, 0)
    count = drawn(lambda seed: choose(some, 1, seed, weighted=False), 6000)
    assert [count[p.client] / 6000 for p in some] == pytest.approx([1 / 3] * 3, abs=0.03)


def test_draws_go_by_name_and_seed() -> None:
    some = profiles(5, 5, 5, 5, 5)
    others = [dataclasses.replace(p, node=100 + p.node) for p in reversed(some)]

    one = [p.client for p in choose(some, 2, 1, weighted=True)]

    assert one == [p.client for p in choose(others, 2, 1, weighted=True)]
    assert one == sorted(one)
    assert len({tuple(p.client for p in choose(some, 2, s, weighted=True)) for s in range(30)}) > 3


def test_nobody_is_asked_first_in_every_round() -> None:
    """One by one, the first asked are the first to answer; an attempt keeps its round's order."""
    some = profiles(1, 1, 1)
    orders = [[p.client for p in draw(Config(), some, 3, number)] for number in range(30)]

    assert {order[0] for order in orders} == {"c0", "c1", "c2"}
    again = [[p.client for p in draw(Config(), some, 3, number, 2)] for number in range(30)]
    assert orders == again


def test_clients_without_examples_and_those_just_lost_come_last() -> None:
    for seed in range(30):
        names = [p.client for p in choose(profiles(0, 1, 1), 2, seed, weighted=True)]
        assert names == ["c1", "c2"]
        avoided = choose(profiles(9, 9, 1), 1, seed, weighted=True, avoid=["c0", "c1"])
        assert [p.client for p in avoided] == ["c2"]
    assert len(choose(profiles(9, 9), 2, 0, weighted=True, avoid=["c0", "c1"])) == 2


@pytest.mark.parametrize(
    ("present", "fraction", "oversample", "expected"),
    [
        (10, 1.0, 0.5, (10, 10)),
        (10, 0.5, 0.0, (5, 5)),
        (10, 0.5, 0.2, (5, 6)),
        (10, 0.5, 0.3, (5, 7)),
        (100, 0.5, 0.1, (50, 55)),
        (10, 0.1, 0.0, (2, 2)),
        (100, 0.3, 4.0, (30, 100)),
    ],
)
def test_sizes(present: int, fraction: float, oversample: float, expected: tuple[int, int]) -> None:
    federation = FederationConfig(min_clients=2, oversample=oversample)
    assert sizes(present, fraction, federation) == expected


def test_quorum_is_a_share_rounded_up_and_never_nobody() -> None:
    assert [quorum(10, share) for share in (0.0, 0.05, 0.7, 0.71, 1.0)] == [1, 1, 7, 8, 10]
    assert quorum(100, 0.55) == 55
