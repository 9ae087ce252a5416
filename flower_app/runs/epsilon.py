"""What noise proves of an example's own rows and a client's updates, and what not, by Opacus."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from conf.schema import Config

UNIT = "an example's own rows of h1 and dL/dh2, all rounds, against the server"
ALWAYS = (
    "lengths and which tokens count",
    "loss, tokens and gradient norm of each step, which are told as they are",
    "held-out examples",
    "generation",
    "rounds that are tried again or resumed, which cross once more",
)
"""What the epsilon of a run leaves out, whatever its settings."""


UPDATES = "all of a client's data, by the updates of its ends in all rounds, against the server"
UPDATES_LEAVE = (
    "h1, h2, dL/dh2 and dL/dh1 of every step, in which the server reads the texts themselves",
    "the trunk, which learns of these and is the server's",
    "loss, tokens, lengths and gradient norm of each step, and how much a client weighs",
    "rounds that are tried again or resumed, which are sent once more",
)
"""What epsilon of the ends' updates leaves out."""


def privacy_of(config: Config, rounds: int | None = None) -> dict[str, Any] | None:
    """What a run says of its differential privacy; None without noise.

    It is no epsilon of the run: what is left out is listed beside it.

    An example crosses in each epoch as h1 and as dL/dh2, each time a Gaussian mechanism. Replacing
    it moves what is sent by at most twice its length; a length is `privacy.clip`, or, where tokens
    are clipped one by one, that times the root of `data.context`. A client's update of its ends is
    one such mechanism in each round, of the length `privacy.update_clip`. Nothing is gained by
    sampling, for the server sees whose turn it is. Opacus's `RDPAccountant` composes (Mironov,
    "Renyi Differential Privacy", 2017).

    Parameters
    ----------
    config : Config
        The run's.
    rounds : int, optional
        Trained so far; all of the run's, if not given.

    Returns
    -------
    dict
        `epsilon` at `delta` of `unit`, over `releases` of each crossing; None with `why` where none
        can be stated. `leaves-out`: what else the server sees that may tell of the example.
        `updates`: the same of the ends' updates, of which the unit is a client.
    """
    rounds = config.train.rounds if rounds is None else rounds
    told = _rows(config, rounds) if config.privacy.defence == "gaussian" else {}
    if config.privacy.update_clip:
        told["updates"] = _updates(config, rounds)
    return told or None


def epsilon_so_far(config: Config, rounds: int) -> dict[str, float]:
    """Epsilon after so many rounds, of `rows` and `updates`; without what has none."""
    told = privacy_of(config, rounds) if rounds else None
    parts = {"rows": told or {}, "updates": (told or {}).get("updates", {})}
    return {name: each["epsilon"] for name, each in parts.items() if each.get("epsilon")}


def _rows(config: Config, rounds: int) -> dict[str, Any]:
    own = config.privacy
    tokens = config.data.context if own.unit == "token" else 1
    crossings = {"h1": (own.clip, own.noise), "dL/dh2": (own.clip_gradient, own.noise_gradient)}
    # A run of so many steps shows an example at most once in each.
    times = rounds * (config.train.local_steps or config.train.local_epochs)
    out = [*ALWAYS, *_left_out(config)]
    told = {"unit": UNIT, "delta": own.delta, "releases": times, "leaves-out": out}
    bare = [name for name, (clip, noise) in crossings.items() if not (clip and noise)]
    why = f"no clip and noise of {' and '.join(bare)}" if bare else ""
    noises = [noise / (2 * tokens**0.5) for _, noise in crossings.values()]
    return {**told, **_stated(noises, times, own.delta, why)}


def _updates(config: Config, rounds: int) -> dict[str, Any]:
    """A client takes part in each round at most once."""
    own = config.privacy
    told = {"unit": UPDATES, "delta": own.delta, "releases": rounds}
    why = "" if own.update_noise else "no noise of updates: privacy.update_noise=0"
    stated = _stated([own.update_noise / 2], rounds, own.delta, why)
    return {**told, "leaves-out": list(UPDATES_LEAVE), **stated}


def _stated(noises: list[float], times: int, delta: float, why: str) -> dict[str, Any]:
    if not why and find_spec("opacus") is None:
        why = "opacus is not installed: pip install 'graft[privacy]'"
    return {"epsilon": None, "why": why} if why else {"epsilon": _epsilon((*noises,), times, delta)}


def _left_out(config: Config) -> list[str]:
    """What these settings let out besides."""
    found = []
    if (config.tuning.bottom, config.tuning.top) != ("frozen", "frozen"):
        found.append("what trained ends learn of it: it moves other examples' rows, too")
        if config.aggregation.ends != "local" and config.privacy.ends == "plain":
            noised = ", with noise: see updates" if config.privacy.update_noise else ""
            found.append(f"the ends' updates, which the server reads{noised}")
    if config.link.cache_mb:
        found.append("which examples are the same (link.cache_mb names them alike)")
    return found


@lru_cache(maxsize=256)
def _epsilon(multipliers: tuple[float, ...], times: int, delta: float) -> float:
    """Of so many Gaussian mechanisms of each noise multiplier."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for multiplier in multipliers:
        for _ in range(times):
            accountant.step(noise_multiplier=multiplier, sample_rate=1.0)
    with warnings.catch_warnings():  # the bound at the edge of the orders tried is one, too
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))
