"""Tokens from h1, by a search over the vocabulary with the prefix that is known by then.

h1 of position t follows from the tokens up to t: with those before it found, every token is tried
in its place, and the one whose h1 is nearest is taken (SipIt, Nikolaou et al. 2025,
arXiv:2510.15511). With a lossy codec, noise or ends of another step the nearest is no longer the
same, and is still the likeliest.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, K candidates tried at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from models import Part
from models.cached import PartCache
from simulations.audit.attack import NotApplicable, TokenAttack
from simulations.audit.observation import EXACT, STALE, START, Knowledge, Observation

TRIED = 512
"""Candidates that are run at once."""
SHORT_LIST = 1024
"""Of a larger vocabulary so many tokens are tried, those whose h1 without a prefix is nearest."""


class Search(TokenAttack):
    """Exhaustive search, token by token."""

    name = "search"
    reads = ("h1",)
    levels: ClassVar[tuple[str, ...]] = (EXACT, STALE, START)
    finds = 0.99

    def guess(
        self, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `TokenAttack.guess`."""
        found = []
        for crossed in observation.crossed:
            if crossed.h1_BTD is None:
                raise NotApplicable("no h1 crossed")
            bottom, _ = knowledge.ends(crossed)
            found.append(search(bottom, crossed.h1_BTD, knowledge))
        return found


@torch.no_grad()
def search(bottom: Part, h1_BTD: Tensor, knowledge: Knowledge) -> Tensor:
    """Tokens (B, T) whose activations come nearest to those that were sent.

    Parameters
    ----------
    bottom : Part
        As the attacker has it.
    h1_BTD : Tensor
        As the server decodes it; zero where there is padding.
    knowledge : Knowledge
        The vocabulary, and what becomes of h1 on its way.
    """
    B, T = h1_BTD.shape[:2]
    alone_VD = _alone(bottom, knowledge)
    found_BT = torch.zeros(B, T, dtype=torch.long)
    cache = PartCache(bottom.config, bottom.blocks)
    for t in range(T):
        tried_BK = _candidates(h1_BTD[:, t], alone_VD)
        h_BKD = torch.cat([_tried(bottom, cache, ids) for ids in tried_BK.split(TRIED, 1)], 1)
        distances_BK = (knowledge.sent(h_BKD) - h1_BTD[:, None, t]).norm(dim=2)
        best_B1 = tried_BK.gather(1, distances_BK.argmin(1, keepdim=True))
        found_BT[:, t] = best_B1[:, 0]
        bottom(best_B1, cache=cache)
    return found_BT


def _alone(bottom: Part, knowledge: Knowledge) -> Tensor:
    """h1 of each token as the first of a text (V, D)."""
    ids_V1 = torch.arange(knowledge.vocabulary)[:, None]
    return torch.cat([knowledge.sent(bottom(ids)[:, 0]) for ids in ids_V1.split(4096)])


def _candidates(h1_BD: Tensor, alone_VD: Tensor) -> Tensor:
    """Tokens to try (B, K): all of a small vocabulary."""
    if len(alone_VD) <= SHORT_LIST:
        return torch.arange(len(alone_VD)).expand(len(h1_BD), -1)
    return torch.cdist(h1_BD, alone_VD).topk(SHORT_LIST, largest=False).indices


def _tried(bottom: Part, cache: PartCache, tried_BK: Tensor) -> Tensor:
    """h1 of each candidate behind the known prefix (B, K, D).

    They are run as K positions that see the prefix and themselves, but not each other: so the
    prefix's keys and values are there once, not K times.
    """
    length, (B, K) = cache.length, tried_BK.shape
    mask_KL = torch.full((K, length + K), float("-inf"))
    mask_KL[:, :length] = 0.0
    mask_KL[:, length:].fill_diagonal_(0.0)
    mask_B1KL = mask_KL.expand(B, 1, -1, -1)
    positions_BK = torch.full((B, K), length)
    h_BKD = bottom(tried_BK, mask_B1KL, positions=positions_BK, cache=cache)
    cache.keep((), length)
    return h_BKD
