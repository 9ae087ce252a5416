"""Several clients on one trunk, against the unsplit model, in little."""

from __future__ import annotations

import pytest

from conf.rules import ConfigError
from simulations.bench.clients import Asked, bench_clients

TINY = {"blocks": 3, "hidden": 32, "vocabulary": 64, "batch": 2, "tokens": 8}


@pytest.mark.slow
def test_every_policy_is_timed_with_every_number_of_clients() -> None:
    asked = Asked(clients=(1, 2), micros=2, window=2, turns=1)

    rows = bench_clients(asked, sizes=TINY)["rows"]

    assert [(row["strategy"], row["clients"]) for row in rows] == [
        (strategy, count)
        for strategy in ("merged", "splitfed-v1", "splitfed-v2")
        for count in (1, 2)
    ]
    for row in rows:
        ours, theirs = row["tokens_per_second"], row["unsplit_tokens_per_second"]
        assert row["ratio"] == pytest.approx(ours / theirs, rel=0.05)
        assert bool(row["replica_with_moments_mib"]) == (row["strategy"] == "splitfed-v1")


def test_a_policy_that_nobody_offers_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="did you mean 'merged'"):
        bench_clients(Asked(strategies=("merge",)))
