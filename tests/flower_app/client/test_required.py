"""A site takes part in no run that protects less than its own configuration demands."""

from __future__ import annotations

from typing import Any

import pytest

from conf.sections.privacy import PrivacyConfig
from flower_app.client.required import refuse_weaker

STRONG: dict[str, Any] = {"defence": "gaussian", "clip": 4.0, "noise": 0.05}
DEMAND = {"privacy-require": "defence=gaussian clip=4 noise=0.05"}


@pytest.mark.parametrize("changes", [{}, {"noise": 0.1}, {"clip": 2.0}])
def test_as_strong_or_stronger_is_served(changes: dict[str, Any]) -> None:
    refuse_weaker(PrivacyConfig(**{**STRONG, **changes}), DEMAND)
    refuse_weaker(PrivacyConfig(), {})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise": 0.04}, "noise of at least 0.05.*privacy.noise=0.04"),
        ({"clip": 5.0}, "clip of at most 4.*privacy.clip=5"),
        ({"clip": 0.0}, "clip of at most 4.*privacy.clip=0"),
        (
            {"defence": "none", "clip": 0.0, "noise": 0.0},
            "demands defence=gaussian.*privacy.defence=none: start it with privacy.defence=gauss",
        ),
    ],
)
def test_weaker_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_weaker(PrivacyConfig(**{**STRONG, **changes}), DEMAND)


@pytest.mark.parametrize(
    ("demand", "words"),
    [
        ("nose=1", "says 'nose=1'"),
        ("noise", "says 'noise'"),
        ("noise=1 noise=2", "says 'noise=2'"),
        ("noise=much", "noise=much: it must be a number"),
        ("clip=0", "clip=0: it must be a number"),
        ("noise=nan", "noise=nan: it must be a number"),
        ("weight=0.05", "does nothing by itself: demand defence beside it"),
        ("unit=token", "does nothing by itself"),
        ("delta=0.1", "demand noise or noise_gradient or update_noise"),
        (7, "is no text"),
    ],
)
def test_a_demand_that_cannot_be_read_serves_nobody(demand: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_weaker(PrivacyConfig(), {"privacy-require": demand})
