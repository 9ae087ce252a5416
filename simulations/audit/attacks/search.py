"""Tokens from h1, by a search over the vocabulary with the prefix that is known by then.

h1 of position t follows from the tokens up to t: with those before it found, every token is tried
in its place, and the one whose h1 is nearest is taken (SipIt, Nikolaou et al. 2025,
arXiv:2510.15511). With a lossy codec or ends of another step the nearest is no longer the same, and
is still the likeliest. Where the defence adds noise, whose deviation is known, nearness is weighed
against what the attacker's own whole model expects to follow.

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
from simulations.audit.observation import EXACT, STALE, START, Crossed, Knowledge, Observation

TRIED = 512
"""Candidates that are run at once."""
SHORT_LIST = 1024
"""Of a larger vocabulary so many tokens are tried first: those whose h1 is nearest behind another
prefix."""
FAR = 2.0
"""Times the usual distance: then none of the short list is right, and all tokens are tried."""
PREFIX = 8
"""Tokens of public text that the short list is made behind."""


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
    list_VD = _table(bottom, knowledge) if knowledge.vocabulary > SHORT_LIST else None
    everything_BV = torch.arange(knowledge.vocabulary).expand(B, -1)
    found_BT, distances_BT = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T)
    cache = PartCache(bottom.config, bottom.blocks)
    expected = Expected(bottom, knowledge)
    for t in range(T):
        tried_BK = everything_BV if list_VD is None or not t else _listed(h1_BTD[:, t], list_VD)
        best_B, distance_B = _best(bottom, cache, tried_BK, h1_BTD[:, t], knowledge, expected)
        usual_B = distances_BT[:, :t].median(1).values if t else distance_B
        if tried_BK.shape[1] < knowledge.vocabulary and bool((distance_B > FAR * usual_B).any()):
            best_B, distance_B = _best(
                bottom, cache, everything_BV, h1_BTD[:, t], knowledge, expected
            )
        found_BT[:, t], distances_BT[:, t] = best_B, distance_B
        expected.go_on(bottom(best_B[:, None], cache=cache))
    return found_BT


def _table(bottom: Part, knowledge: Knowledge) -> Tensor:
    """h1 of each token behind some text (V, D): about as it is behind any other."""
    before = knowledge.public[0][:PREFIX]
    ids_VT = torch.tensor([[*before, i] for i in range(knowledge.vocabulary)])
    return torch.cat([knowledge.sent(bottom(ids)[:, -1]) for ids in ids_VT.split(1024)])


def _listed(h1_BD: Tensor, list_VD: Tensor) -> Tensor:
    """The tokens that look most like it (B, K), no axis being larger than others."""
    scale_D = list_VD.std(0)
    distances_BV = torch.cdist(h1_BD / scale_D, list_VD / scale_D)
    return distances_BV.topk(SHORT_LIST, largest=False).indices


def _best(
    bottom: Part,
    cache: PartCache,
    tried_BK: Tensor,
    h1_BD: Tensor,
    knowledge: Knowledge,
    expected: Expected,
) -> tuple[Tensor, Tensor]:
    """The token (B,) whose h1 behind the known prefix is nearest, and how near that is.

    Through noise the likeliest one: nearness is weighed against what the model expects.
    """
    distances_BK = torch.cat(
        [
            (knowledge.sent(_tried(bottom, cache, ids_BK)) - h1_BD[:, None]).norm(dim=2)
            for ids_BK in tried_BK.split(TRIED, 1)
        ],
        1,
    )
    at_B1 = expected.scores(distances_BK, tried_BK).argmin(1, keepdim=True)
    return tried_BK.gather(1, at_B1)[:, 0], distances_BK.gather(1, at_B1)[:, 0]


class Expected:
    """What the attacker's whole model expects after the tokens that were found.

    Parameters
    ----------
    bottom : Part
        As the attacker has it; what its `go_on` is given comes from it.
    knowledge : Knowledge
        Without noise, or without a trunk, nothing is expected.
    """

    def __init__(self, bottom: Part, knowledge: Knowledge) -> None:
        self._noise = knowledge.noise
        self._vocabulary = knowledge.vocabulary
        self._rest: list[tuple[Part, PartCache]] = []
        if knowledge.noise and knowledge.trunk is not None:
            _, top = knowledge.ends(Crossed(step=0, micro=0))
            parts = (knowledge.trunk, top)
            self._rest = [(part, PartCache(part.config, part.blocks)) for part in parts]
        self._expected_BV: Tensor | None = None

    def go_on(self, h_B1D: Tensor) -> None:
        """Take h1 of the token that was found."""
        for part, cache in self._rest:
            h_B1D = part(h_B1D, cache=cache)
        if self._rest:
            self._expected_BV = h_B1D[:, 0, : self._vocabulary].float().log_softmax(-1)

    def scores(self, distances_BK: Tensor, tried_BK: Tensor) -> Tensor:
        """Less is likelier (B, K): distances, or by Gaussian noise and the model's expectation."""
        if self._expected_BV is None:
            return distances_BK
        expected_BK = self._expected_BV.gather(1, tried_BK)
        return distances_BK.square() / (2 * self._noise**2) - expected_BK


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
