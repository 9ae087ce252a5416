"""Is an attack's verdict worth anything? It must find a planted leak, and nothing in shuffled data.

The planted leak is an undefended wire in fp32 whose ends the attacker knows: what must be found
there, and how near to chance an attack must stay when its truth is shuffled, each attack's class
says, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from conf.load import from_json, to_json
from conf.schema import Config, PrivacyConfig
from conf.sections.link import read_codecs
from simulations.audit.attack import Attack, NotApplicable, Score, Scores
from simulations.audit.observation import SERVER
from simulations.audit.recorder import Recorder
from simulations.audit.recording import Recording, Scope
from simulations.audit.subject import subject_of

PLANTED = Scope(clients=2, warm=4, steps=2, sequences=2)
"""What is recorded of the planted leak."""


def calibrate_all(
    attacks: Sequence[Attack], config: Config, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Try each attack where it must find something, and where it must not.

    Returns
    -------
    dict
        By attack: ``found`` of at least ``must_find``, ``shuffled`` of at most ``must_not_pass``.
    dict
        By attack, why there is no verdict of it.
    """
    told, refused = {}, {}
    for attack in attacks:
        one = _calibrated(attack, config)
        if isinstance(one, str):
            refused[attack.name] = one
            continue
        told[attack.name] = dict(one)
        say(
            f"calibration, {attack.name}: planted {one['found']:.3f} (at least "
            f"{one['must_find']:.3f}), shuffled {one['shuffled']:.3f} (at most "
            f"{one['must_not_pass']:.3f})"
        )
        if why := _why_not(one):
            refused[attack.name] = why
    return told, refused


def _calibrated(attack: Attack, config: Config) -> dict[str, float] | str:
    try:
        wire, scope = attack.planted(replace(undefended(config), seed=0), PLANTED)
    except NotApplicable as error:
        return str(error)
    kind: Callable[[], Attack] = type(attack)
    return _calibrate(kind, to_json(wire), scope)


def undefended(config: Config) -> Config:
    """The configuration without codec and defences."""
    link = replace(config.link, codec=read_codecs("fp32"))
    return replace(config, link=link, privacy=PrivacyConfig())


@lru_cache(maxsize=64)
def _calibrate(kind: Callable[[], Attack], wire: str, scope: Scope) -> dict[str, float] | str:
    """What it scores on a wire, which points of a study share; why, if it has nothing to read."""
    attack, recording = kind(), _recorded(wire, scope)
    level = attack.levels[0]
    try:
        own = attack_all(attack, recording, level, 0)[attack.metric]
        blind = attack_all(attack, recording, level, 0, shuffled=True)[attack.metric]
    except NotApplicable as error:
        return str(error)
    return {
        "found": own.value,
        "must_find": attack.finds,
        "shuffled": blind.value,
        "must_not_pass": (blind.chance or 0.0) + attack.margin,
    }


@lru_cache(maxsize=2)
def _recorded(wire: str, scope: Scope) -> Recording:
    return Recorder(subject_of(from_json(wire)), scope).record()


def _why_not(told: Mapping[str, float]) -> str:
    if told["found"] < told["must_find"]:
        return (
            f"no verdict: it finds {told['found']:.3f} of a planted leak, and must find "
            f"{told['must_find']:.3f}"
        )
    if told["shuffled"] > told["must_not_pass"]:
        return (
            f"no verdict: it scores {told['shuffled']:.3f} on shuffled data, and may score "
            f"{told['must_not_pass']:.3f}"
        )
    return ""


def attack_all(
    attack: Attack,
    recording: Recording,
    level: str,
    seed: int,
    *,
    who: str = SERVER,
    shuffled: bool = False,
) -> Scores:
    """Attack every client of a recording; metrics are weighted by what they are of.

    With `shuffled` the truth is another one, of the same tokens and examples. None, where `who`
    sees nobody.
    """
    rng = np.random.default_rng(seed)
    each = []
    for client in recording.seen_by(who):
        truth = attack.shuffled(client.truth, rng) if shuffled else client.truth
        knowledge = recording.knowledge(client, level)
        each.append(attack.run(client.observation, knowledge, truth, rng))
    names = dict.fromkeys(name for scores in each for name in scores)
    return {name: joined([s[name] for s in each if name in s]) for name in names}


def joined(scores: Sequence[Score]) -> Score:
    """The mean of scores, by what they are of."""
    weights = [score.count for score in scores]
    chances = [score.chance for score in scores if score.chance is not None]
    known = len(chances) == len(scores)
    return Score(
        value=float(np.average([score.value for score in scores], weights=weights)),
        chance=float(np.average(chances, weights=weights)) if known else None,
        count=sum(weights),
    )
