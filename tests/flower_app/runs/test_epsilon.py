"""What noise proves, by a known bound; and what is said where it proves nothing."""

from __future__ import annotations

import math

import pytest

from conf.load import load_config
from flower_app.runs import epsilon
from flower_app.runs.epsilon import privacy_of
from flower_app.runs.summary import summarize

NOISY = ("privacy.defence=gaussian", "privacy.clip=4", "privacy.clip_gradient=0.001")


def _of(noise: float, *changes: str) -> float:
    told = privacy_of(
        load_config(
            "demo",
            [*NOISY, f"privacy.noise={noise}", f"privacy.noise_gradient={noise}", *changes],
        )
    )
    assert told is not None
    return float(told["epsilon"])


def _by_renyi(multiplier: float, releases: int, delta: float) -> float:
    """Mironov 2017, propositions 3 and 7: of any order, so of the best one."""
    orders = (1 + x / 100 for x in range(1, 6000))
    return min(releases * a / (2 * multiplier**2) + math.log(1 / delta) / (a - 1) for a in orders)


@pytest.mark.parametrize("noise", [4.0, 20.0])
def test_epsilon_is_below_the_plain_bound_and_near_it(noise: float) -> None:
    """Replacing an example moves what is sent by twice its length, and it crosses twice a time."""
    one = ("train.rounds=3", "train.local_epochs=2", "train.local_steps=0", "privacy.unit=sequence")
    bound = _by_renyi(noise / 2, 2 * 3 * 2, 1e-5)
    assert 0.7 * bound < _of(noise, *one) <= bound * 1.001


def test_tokens_clipped_alone_prove_less() -> None:
    """Of an example of 64 tokens as if the noise were an eighth."""
    rest = ("train.rounds=1", "train.local_steps=1", "data.context=64")
    tokens = _of(80.0, *rest, "privacy.unit=token")
    assert tokens == pytest.approx(_of(10.0, *rest, "privacy.unit=sequence"))


@pytest.mark.parametrize(
    ("changes", "words", "absent"),
    [
        ((), "other examples' rows", "names them alike"),
        ((), "the ends' updates, which the server reads", "names them alike"),
        (("privacy.ends=masked",), "other examples' rows", "which the server reads"),
        (
            ("tuning.bottom=frozen", "tuning.top=frozen", "link.cache_mb=8"),
            "names them alike",
            "other examples' rows",
        ),
    ],
)
def test_what_epsilon_leaves_out_is_said(changes: tuple[str, ...], words: str, absent: str) -> None:
    """Ends that learn carry an example into others' rows; steps' losses are told in the clear."""
    settings = [*NOISY, "privacy.noise=1", "privacy.noise_gradient=1", *changes]
    told = summarize(load_config("demo", settings), [], 1.0)["privacy"]
    left = "; ".join(told["leaves-out"])
    assert words in left
    assert absent not in left
    assert "loss, tokens and gradient norm of each step" in left
    assert "own rows" in told["unit"]


def test_where_nothing_can_be_proven_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert privacy_of(load_config("demo")) is None
    bare = privacy_of(load_config("demo", ["privacy.defence=gaussian", "privacy.noise=1"]))
    assert bare is not None
    assert bare["epsilon"] is None
    assert bare["why"] == "no clip and noise of h1 and dL/dh2"
    monkeypatch.setattr(epsilon, "find_spec", lambda name: None)
    settings = [*NOISY, "privacy.noise=1", "privacy.noise_gradient=1"]
    told = summarize(load_config("demo", settings), [], 1.0)["privacy"]
    assert told["epsilon"] is None
    assert "graft[privacy]" in told["why"]
    assert "privacy" not in summarize(load_config("demo"), [], 1.0)


def test_epsilon_of_updates_is_of_a_client_and_grows_by_rounds() -> None:
    """One release a round, of twice the clip, whatever a round's steps."""
    config = load_config(
        "demo", ["privacy.update_clip=1", "privacy.update_noise=8", "train.rounds=5"]
    )
    told = privacy_of(config)
    assert told is not None
    assert "epsilon" not in told  # nothing is said of examples' rows
    bound = _by_renyi(4.0, 5, 1e-5)
    assert 0.7 * bound < told["updates"]["epsilon"] <= bound * 1.001
    assert "every step" in "; ".join(told["updates"]["leaves-out"])
    so_far = [epsilon.epsilon_so_far(config, n).get("updates", 0.0) for n in (0, 1, 3, 5)]
    assert so_far[0] == 0.0
    assert so_far == sorted(set(so_far))
    assert so_far[-1] == told["updates"]["epsilon"]
    bare = privacy_of(load_config("demo", ["privacy.update_clip=1"]))
    assert bare is not None
    assert bare["updates"]["epsilon"] is None


def test_a_summary_counts_the_rounds_that_were_trained() -> None:
    """A run that stops early has shown less, and one that is cut off perhaps a round more."""
    config = load_config("demo", ["privacy.update_clip=1", "privacy.update_noise=8"])
    record = {"tokens": 1, "clients": [], "bytes_up": 0, "bytes_down": 0, "missing": {}}
    rounds = [{**record, "round": number} for number in range(3)]
    told = [
        summarize(config, rounds[: 1 + n], 1.0, cut_off=cut)["privacy"]["updates"]["releases"]
        for n, cut in ((0, False), (2, False), (1, True))
    ]
    assert told == [0, 2, 2]
    assert config.train.rounds == 3
    more = [*rounds, {**record, "round": 3}]
    assert summarize(config, more, 1.0, cut_off=True)["privacy"]["updates"]["releases"] == 3
