"""Who is drawn for a round, and what of a step each client gives: arithmetic on profiles."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from conf.schema import Config, FederationConfig, TrainConfig
from strategies.aggregate.robust.registry import fewest
from strategies.optim import derive_seed
from strategies.rounds.answers import Profile

ROUNDING = 1e-9
"""0.55 * 100 is a little more than 55."""


def sizes(present: int, fraction: float, federation: FederationConfig) -> tuple[int, int]:
    """How many answers a round needs of how many clients: the share asked for, and `min_clients`.

    Returns
    -------
    count, asked : int
        The cohort, and with it those who are asked beyond it (`federation.oversample`).
    """
    count = min(present, max(federation.min_clients, round(fraction * present)))
    return count, min(present, math.ceil(count * (1 + federation.oversample) - ROUNDING))


def quorum(count: int, share: float) -> int:
    """How many of `count` answers let a round count: at least one."""
    return max(1, math.ceil(share * count - ROUNDING))


def needed(count: int, config: Config) -> int:
    """How many of `count` answers a training round needs: its quorum, and enough to aggregate."""
    return max(quorum(count, config.federation.quorum), fewest(config.aggregation))


def draw(
    config: Config,
    present: Sequence[Profile],
    count: int,
    number: int,
    attempt: int = 1,
    avoid: Iterable[str] = (),
) -> list[Profile]:
    """Draw the cohort of an attempt at round `number`; see `choose`.

    Their order is drawn too, for the round: where clients run one by one, those asked first
    answer first, and should not be the same ones in every round.
    """
    again = (attempt,) if attempt > 1 else ()
    seed = derive_seed(config.seed, number, "sample", *again)
    weighted = config.federation.sampling == "weighted"
    cohort = choose(present, count, seed, weighted=weighted, avoid=avoid)
    return sorted(cohort, key=lambda p: derive_seed(config.seed, number, "order", p.client))


def choose(
    present: Sequence[Profile], count: int, seed: int, *, weighted: bool, avoid: Iterable[str] = ()
) -> list[Profile]:
    """Draw `count` clients without replacement, by name, so that equal seeds draw alike.

    Each client gets the key ``-ln(u) / w``, with u uniform in (0, 1] from the seed and its name,
    and the smallest keys win: Efraimidis & Spirakis 2006, *Weighted random sampling with a
    reservoir* (Information Processing Letters 97(5)), whose keys ``u ** (1 / w)`` have the reverse
    order. It is as if clients were drawn one after the other, each time with probability in
    proportion to w among those left.

    Parameters
    ----------
    present : sequence of Profile
        Who can take part.
    count : int
        How many to draw.
    seed : int
        Of this draw.
    weighted : bool
        w is a client's examples, else 1. A client without examples comes last.
    avoid : iterable of str
        Names to draw only if the others are too few.

    Returns
    -------
    list of Profile
        By name.
    """
    shunned = set(avoid)

    def key(profile: Profile) -> tuple[bool, float, str]:
        uniform = 1.0 - random.Random(derive_seed(seed, profile.client)).random()
        weight = profile.examples if weighted else 1
        place = -math.log(uniform) / weight if weight else math.inf
        return profile.client in shunned, place, profile.client

    return sorted(sorted(present, key=key)[:count], key=lambda profile: profile.client)


def draw_batches(
    cohort: Sequence[Profile], train: TrainConfig, seed: int, number: int
) -> dict[str, list[int]]:
    """Draw how many examples each client gives to each step, so that all steps have `global_batch`.

    As if the clients' examples lay in one heap and were drawn without replacement, anew when the
    heap is empty: multivariate hypergeometric counts. Source: Kohankhaki et al. 2024, *Parallel
    Split Learning with Global Sampling* (arXiv:2407.15738). Which examples they are, clients draw.

    Returns
    -------
    dict[str, list of int]
        By client; one number for each step, 0 where it has no example in it. Without
        `train.local_steps` an epoch's last step has what is left.
    """
    names = [profile.client for profile in cohort]
    heap = np.array([profile.examples for profile in cohort], dtype=np.int64)
    if heap.sum() == 0:
        raise RuntimeError("train.global_batch: no client of the cohort has an example")
    random = np.random.default_rng(derive_seed(seed, number, "global-batch"))
    epoch = math.ceil(heap.sum() / train.global_batch)
    steps, left, drawn = train.local_steps or epoch * train.local_epochs, heap * 0, []
    for _ in range(steps):
        if not left.sum():
            left = heap.copy()
        taken = random.multivariate_hypergeometric(left, min(train.global_batch, int(left.sum())))
        left = left - taken
        drawn.append(taken)
    return {name: [int(taken[i]) for taken in drawn] for i, name in enumerate(names)}


def draw_again(
    config: Config, present: Sequence[Profile], number: int, attempt: int, lost: Mapping[str, str]
) -> tuple[list[Profile], int]:
    """Draw a training cohort, and say how many answers are enough.

    Those who were just `lost` are asked again only if a round needs them.
    """
    federation = config.federation
    count, asked = sizes(len(present), federation.fraction_train, federation)
    asked = max(count, min(asked, len([p for p in present if p.client not in lost])))
    return draw(config, present, asked, number, attempt, avoid=lost), count
