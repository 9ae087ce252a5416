"""Poisoned updates: what plain averaging does not survive, and robust aggregation does."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from simulations.disturb.poison import ATTACKS
from simulations.study.poison import SIZE, study_poison

SMALL = replace(SIZE, clients=7, rounds=2, local_steps=6, context=32, max_examples=24)


@cache
def trained(attack: str, method: str, *, small: bool = True) -> dict[str, Any]:
    return study_poison([attack], [method], size=SMALL if small else SIZE)[0]


@pytest.mark.parametrize("method", ["median", "krum"])
@pytest.mark.parametrize("attack", ["sign flip", "scaling"])
def test_an_attack_that_plain_averaging_fails_is_survived(attack: str, method: str) -> None:
    honest = trained("nobody", "none")

    assert honest["loss"] < 4.5
    assert trained(attack, "none")["loss"] > honest["loss"] + 0.5
    assert trained(attack, method)["loss"] < honest["loss"] + 0.25
    assert honest["stood_out"] == {}
    for how in ("none", method):
        assert trained(attack, how)["stood_out"] == {"client-0": 2, "client-1": 2}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["median", "trimmed-mean", "krum", "multi-krum", "norm-bound"])
@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "nobody"])
def test_every_method_against_every_attack(attack: str, method: str) -> None:
    honest, plain = (trained(name, "none", small=False) for name in ("nobody", attack))
    found = trained(attack, method, small=False)

    if attack == "backdoor":
        assert honest["backdoor"] < 0.02
        assert plain["backdoor"] > 0.9
    else:
        assert plain["loss"] > honest["loss"] + 0.3
    assert found["loss"] < honest["loss"] + 0.3
