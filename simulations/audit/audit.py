"""`graft audit`: attacks what a run lets a curious server see, and says what comes of it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from conf.schema import Config
from flower_app.build import cut_of
from simulations.audit.adaptive import seen_ends
from simulations.audit.attack import Attack, NotApplicable, Score, find_attacks
from simulations.audit.calibrate import attack_all, calibrate_all, joined
from simulations.audit.observation import EXACT, STALE, WHO
from simulations.audit.recorder import Recorder
from simulations.audit.recording import Recording, Scope
from simulations.audit.subject import subject_of

Key = tuple[str, str, str, str]
"""Attack, who attacks, knowledge, metric."""

Row = dict[str, Any]
"""A metric of an attack with a knowledge, over clients and seeds."""


def audit(
    config: Config,
    attacks: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    trained: str = "",
    scope: Scope | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Attack what crosses in training by a configuration.

    Parameters
    ----------
    config : Config
        The run's, its codec and defences too.
    attacks : sequence of str
        Names; empty: all of them.
    seeds : sequence of int
        Of recordings; each begins anew, with weights and an order of its own. Of a run's model the
        weights are what they are, and the order is another one.
    trained : str
        Folder of the model or adapter that a run of this configuration has left.
    scope : Scope, optional
        How much is trained and attacked.
    say : callable
        Hears how it goes.

    Returns
    -------
    dict
        ``rows``: attack, who attacks (``server`` or ``client``), reads, knowledge, metric, whether
        it is the attack's ``main`` one, whether who attacks has what it takes in this run
        (``held``), mean, low, high, values, chance, count;
        ``calibration`` by attack; ``refused``: why by attack.
    """
    started, scope = time.perf_counter(), scope or Scope()
    subject = subject_of(config, trained)
    chosen = find_attacks(attacks)
    calibration, refused = calibrate_all(chosen, config, say)
    plants = sorted({times for attack in chosen for times in attack.plants})
    scope = replace(scope, warm=0 if trained else scope.warm, canaries=tuple(plants))
    found: dict[Key, list[Score]] = {}
    for number, seed in enumerate(seeds):
        own = subject if trained else subject.with_seed(seed)
        recording = Recorder(own, scope).record(2 + number)
        for attack in chosen:
            if attack.name not in refused:
                _add(found, refused, attack, recording, seed, say)
    return {
        "experiment": config.experiment,
        "trained": bool(trained),
        "cut": vars(cut_of(config)),
        "codec": dict(config.link.codec),
        "seeds": list(seeds),
        "scope": asdict(scope),
        "rows": _rows(found, chosen, config),
        "calibration": calibration,
        "refused": refused,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _held(attack: Attack, who: str, level: str, config: Config) -> bool:
    """Whether the attacker has what the attack takes, as this run is configured."""
    takes = level in (EXACT, STALE) or "update" in attack.reads
    return not takes or set(attack.ends) <= seen_ends(config, who)


def _rows(
    found: Mapping[Key, Sequence[Score]], attacks: Sequence[Attack], config: Config
) -> list[Row]:
    by_name = {attack.name: attack for attack in attacks}
    return [
        {
            "attack": name,
            "who": who,
            "reads": ", ".join(by_name[name].reads),
            "knowledge": level,
            "metric": metric,
            "main": metric == by_name[name].metric,
            "held": _held(by_name[name], who, level, config),
            **_over(scores, math.inf if metric.startswith("exposure") else 1.0),
        }
        for (name, who, level, metric), scores in found.items()
    ]


def _add(
    found: dict[Key, list[Score]],
    refused: dict[str, str],
    attack: Attack,
    recording: Recording,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Attack a recording, as each who can and with each knowledge that the attack can use."""
    for who, level in itertools.product(filter(attack.serves, WHO), attack.levels):
        try:
            scores = attack_all(attack, recording, level, seed, who=who)
        except NotApplicable as why:
            refused[attack.name] = str(why)
            return
        for metric, score in scores.items():
            found.setdefault((attack.name, who, level, metric), []).append(score)
        if scores:
            say(f"seed {seed}, {attack.name}, {who}, {level}: {scores[attack.metric].value:.3f}")


def _over(scores: Sequence[Score], most: float) -> Row:
    """Mean over seeds, and its 95 % interval by Student's t; none of one seed."""
    values = [score.value for score in scores]
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        from scipy import stats

        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1))
        half /= len(values) ** 0.5
        low, high = max(0.0, mean - half), min(most, mean + half)
    all_of = joined(scores)
    return {
        "mean": mean, "low": low, "high": high, "values": values,
        "chance": all_of.chance, "count": all_of.count,
    }  # fmt: skip
