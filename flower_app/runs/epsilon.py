"""What noise proves of an example's own rows, and what not, by Opacus's accountant."""

from __future__ import annotations

import warnings
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


def privacy_of(config: Config) -> dict[str, Any] | None:
    """What `summary.json` says of a run's differential privacy; None without noise.

    It is no epsilon of the run: what is left out is listed beside it.

    An example crosses in each epoch as h1 and as dL/dh2, each time a Gaussian mechanism. Replacing
    it moves what is sent by at most twice its length; a length is `privacy.clip`, or, where tokens
    are clipped one by one, that times the root of `data.context`. Nothing is gained by sampling,
    for the server sees whose turn it is. Opacus's `RDPAccountant` composes (Mironov, "Renyi
    Differential Privacy", 2017).

    Returns
    -------
    dict
        `epsilon` at `delta` of `unit`, over `releases` of each crossing; None with `why` where none
        can be stated. `leaves-out`: what else the server sees that may tell of the example.
    """
    own = config.privacy
    if own.defence != "gaussian":
        return None
    tokens = config.data.context if own.unit == "token" else 1
    crossings = {"h1": (own.clip, own.noise), "dL/dh2": (own.clip_gradient, own.noise_gradient)}
    # A run of so many steps shows an example at most once in each.
    times = config.train.rounds * (config.train.local_steps or config.train.local_epochs)
    out = [*ALWAYS, *_left_out(config)]
    told = {"unit": UNIT, "delta": own.delta, "releases": times, "leaves-out": out}
    bare = [name for name, (clip, noise) in crossings.items() if not (clip and noise)]
    if bare:
        why = f"no clip and noise of {' and '.join(bare)}"
        return {**told, "epsilon": None, "why": why}
    if find_spec("opacus") is None:
        why = "opacus is not installed: pip install 'graft[privacy]'"
        return {**told, "epsilon": None, "why": why}
    noises = [noise / (2 * tokens**0.5) for _, noise in crossings.values()]
    return {**told, "epsilon": _epsilon(noises, times, own.delta)}


def _left_out(config: Config) -> list[str]:
    """What these settings let out besides."""
    found = []
    if (config.tuning.bottom, config.tuning.top) != ("frozen", "frozen"):
        found.append("what trained ends learn of it: it moves other examples' rows, too")
        if config.aggregation.ends != "local" and config.privacy.ends == "plain":
            found.append("the ends' updates, which the server reads")
    if config.link.cache_mb:
        found.append("which examples are the same (link.cache_mb names them alike)")
    return found


def _epsilon(multipliers: list[float], times: int, delta: float) -> float:
    """Of so many Gaussian mechanisms of each noise multiplier."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for multiplier in multipliers:
        for _ in range(times):
            accountant.step(noise_multiplier=multiplier, sample_rate=1.0)
    with warnings.catch_warnings():  # the bound at the edge of the orders tried is one, too
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))
