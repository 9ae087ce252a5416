"""Runs side by side: settings with their seeds, mean and spread, and a paired test between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from flower_app.runs.folders import FINISHED
from simulations.report.curves import AXES
from simulations.report.settings import differing, setting_of

MOST_PAIRS = 10
"""Pairs of settings that are tested; with more, each is tested against the best one."""
FEW = 5
"""With fewer pairs than this a test says little, and the report says so."""
LEVEL = 0.95


def compare(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Group runs by setting and test settings against each other.

    Parameters
    ----------
    runs : sequence of dict
        As `numbers.describe` returns them; one row a run.

    Returns
    -------
    dict
        `differing` keys, `settings` with mean and spread over seeds, `tests`, and `words` on what
        could not be tested.
    """
    keys = differing(runs)
    groups: dict[str, list[int]] = defaultdict(list)
    for place, run in enumerate(runs):
        groups[setting_of(run, keys)].append(place)
    told = [
        _setting(name, [runs[place] for place in places]) | {"places": places}
        for name, places in groups.items()
    ]
    repeated = any(len(each["seeds"]) > 1 for each in told)
    pairs = _pairs([each for each in told if each["mean"] is not None]) if repeated else []
    return {
        "differing": keys,
        "settings": told,
        "tests": [paired_test(*pair) for pair in pairs],
        "words": _words(told, pairs, repeated=repeated),
    }


def paired_test(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Test whether two settings end at another held-out loss, seed by seed.

    Parameters
    ----------
    one, other : dict
        With `setting` and `final`: held-out loss by seed.

    Returns
    -------
    dict
        `n` seeds that both have; `difference`, the mean of other minus one; its `low` and `high`
        (95 %), `p` of Student's paired t-test, two-sided; and in `words` what it comes to. What
        cannot be computed is None.
    """
    seeds = sorted(one["final"].keys() & other["final"].keys())
    told: dict[str, Any] = {"one": one["setting"], "other": other["setting"], "n": len(seeds)}
    told |= {"difference": None, "low": None, "high": None, "p": None}
    if not seeds:
        return told | {"words": "no seed in common: nothing pairs up, and nothing is tested"}
    left, right = [[each["final"][seed] for seed in seeds] for each in (one, other)]
    told["difference"] = fmean(b - a for a, b in zip(left, right, strict=True))
    if len(seeds) == 1:
        return told | {"words": "one seed in common: the spread over seeds is not known"}
    if stdev(b - a for a, b in zip(left, right, strict=True)) == 0:
        return told | {"words": "the difference is the same for every seed: no spread to test by"}
    result = stats.ttest_rel(right, left)
    low, high = result.confidence_interval(LEVEL)
    told |= {"low": float(low), "high": float(high), "p": float(result.pvalue)}
    return told | {"words": _verdict(told)}


def _verdict(test: Mapping[str, Any]) -> str:
    few = f"; {test['n']} pairs are few, add seeds" if test["n"] < FEW else ""
    if test["p"] >= 1 - LEVEL:
        return f"no difference beyond the spread of seeds{few}"
    way = "higher" if test["difference"] > 0 else "lower"
    return f"{test['other']} ends {way}{few}"


def _setting(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A setting over its seeds; only finished runs give a final loss."""
    final = {
        run["seed"]: run["summary"]["heldout_last"]
        for run in runs
        if run["status"] == FINISHED and run["summary"]["heldout_last"] is not None
    }
    return {
        "setting": name,
        "runs": [run["name"] for run in runs],
        "seeds": [run["seed"] for run in runs],
        "final": final,
        "mean": fmean(final.values()) if final else None,
        "spread": stdev(final.values()) if len(final) > 1 else None,
        "band": _band([run["curves"]["heldout"] for run in runs]),
    }


def _band(curves: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[float]] | None:
    """Mean and standard deviation of held-out losses at rounds that all seeds have."""
    if len(curves) < 2:
        return None
    by_round = [
        dict(zip(curve["rounds"], range(len(curve["loss"])), strict=True)) for curve in curves
    ]
    common = sorted(set.intersection(*(set(places) for places in by_round)))
    if not common:
        return None
    told: dict[str, list[float]] = {name: [] for name in (*AXES, "loss", "low", "high")}
    for number in common:
        at = [(curve, places[number]) for curve, places in zip(curves, by_round, strict=True)]
        for name in AXES:
            told[name].append(fmean(curve[name][place] for curve, place in at))
        losses = [curve["loss"][place] for curve, place in at]
        mean, spread = fmean(losses), stdev(losses)
        for name, value in (("loss", mean), ("low", mean - spread), ("high", mean + spread)):
            told[name].append(float(f"{value:.6g}"))
    return told


def _pairs(settings: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    pairs = list(combinations(settings, 2))
    if len(pairs) <= MOST_PAIRS:
        return pairs
    best = min(settings, key=lambda each: each["mean"] if each["mean"] is not None else math.inf)
    return [(best, each) for each in settings if each is not best]


def _words(settings: Sequence[Mapping[str, Any]], pairs: Sequence[Any], *, repeated: bool) -> str:
    if len(settings) < 2:
        return "All runs have one setting: there is nothing to test it against."
    if not repeated:
        return (
            "Each setting has one run: whether they differ beyond chance is not known. Repeat them "
            "with other seeds (graft sweep EXPERIMENT KEY=... seed=range(5))."
        )
    if not pairs:
        return "Fewer than two settings have finished runs: nothing is tested."
    some = "each against the best" if len(settings) * (len(settings) - 1) // 2 > len(pairs) else ""
    return (
        "Student's paired t-test, two-sided, on the last held-out losses of finished runs with the "
        f"same seed{', ' + some if some else ''}; p is not corrected for "
        f"{len(pairs)} comparison{'s' if len(pairs) > 1 else ''}."
    )
