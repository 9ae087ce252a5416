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
SHORT_LIST, EXPECTED = 256, 64
"""Of a larger vocabulary so many tokens are tried first: those whose h1 is nearest behind another
prefix; and where h1 crosses with noise, so many of them are those that the model expects most."""
BEAM = 4
"""Texts that are kept of each sequence where h1 crosses with noise, or coarsely."""
FAR = 2.0
"""Times the usual distance: then none of the short list is right, and all tokens are tried."""
PREFIX = 8
"""Tokens of public text that the short list is made behind."""


class Search(TokenAttack):
    """Exhaustive search, token by token."""

    name = "search"
    reads = ("h1",)
    levels: ClassVar[tuple[str, ...]] = (EXACT, STALE, START)
    ends = ("bottom",)
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
    W = BEAM if knowledge.rough else 1
    table = _table(bottom, knowledge) if knowledge.vocabulary > 4 * SHORT_LIST else None
    beam = _Beam(bottom, knowledge, B, W)
    for t in range(T):
        seen_RD = h1_BTD[:, t].repeat_interleave(W, 0)
        tried_RK = beam.listed(seen_RD, *table) if table and t else None
        beam.go_on(seen_RD, tried_RK)
    return beam.texts()


class _Beam:
    """The likeliest texts so far, W for each sequence: R = B W rows.

    Parameters
    ----------
    bottom, knowledge
        The attacker's.
    B, W : int
        Sequences, and how many texts are kept of each.
    """

    def __init__(self, bottom: Part, knowledge: Knowledge, B: int, W: int) -> None:
        self._bottom, self._knowledge, self._B, self._W = bottom, knowledge, B, W
        self._cache = PartCache(bottom.config, bottom.blocks)
        self._expected = Expected(bottom, knowledge)
        self._texts_RT = torch.zeros(B * W, 0, dtype=torch.long)
        self._distances_RT = torch.zeros(B * W, 0)
        # All texts of a sequence are the same at first: one of them counts.
        self._total_R = torch.tensor([0.0] + [float("inf")] * (W - 1)).repeat(B)

    def texts(self) -> Tensor:
        """The likeliest of each sequence (B, T)."""
        return self._texts_RT[:: self._W]

    def listed(self, seen_RD: Tensor, list_VD: Tensor, scale_D: Tensor) -> Tensor:
        """What to try first (R, K): what looks most like it, and what the model expects."""
        distances_RV = torch.cdist(seen_RD / scale_D, list_VD)
        if (expected_RE := self._expected.likeliest(EXPECTED)) is not None:
            distances_RV = distances_RV.scatter(1, expected_RE, -1.0)
        return distances_RV.topk(SHORT_LIST, largest=False).indices

    def go_on(self, seen_RD: Tensor, tried_RK: Tensor | None) -> None:
        """Find the next token of each text among those to try; None: among all."""
        everything_RV = torch.arange(self._knowledge.vocabulary).expand(len(seen_RD), -1)
        short = tried_RK is not None
        tried_RK = everything_RV if tried_RK is None else tried_RK
        distances_RK = self._distances(seen_RD, tried_RK)
        if short and self._is_far(distances_RK):
            tried_RK = everything_RV
            distances_RK = self._distances(seen_RD, tried_RK)
        scores_RK = self._expected.scores(distances_RK, tried_RK)
        totals_BN = (self._total_R[:, None] + scores_RK).view(self._B, -1)
        best = totals_BN.topk(self._W, largest=False)
        K, first_B1 = tried_RK.shape[1], self._W * torch.arange(self._B)[:, None]
        rows_R = (first_B1 + best.indices // K).flatten()
        at_R = (best.indices % K).flatten()
        ids_R1 = tried_RK[rows_R, at_R][:, None]
        self._total_R = best.values.flatten()
        self._texts_RT = torch.cat([self._texts_RT[rows_R], ids_R1], 1)
        distance_R1 = distances_RK[rows_R, at_R][:, None]
        self._distances_RT = torch.cat([self._distances_RT[rows_R], distance_R1], 1)
        if self._W > 1:
            self._cache.keep(rows_R.tolist(), self._cache.length)
            self._expected.keep(rows_R.tolist())
        self._expected.go_on(self._bottom(ids_R1, cache=self._cache))

    def _is_far(self, distances_RK: Tensor) -> bool:
        """Whether nothing of a short list is as near as what was found before."""
        usual_R = self._distances_RT.median(1).values
        return bool((distances_RK.min(1).values > FAR * usual_R).any())

    def _distances(self, seen_RD: Tensor, tried_RK: Tensor) -> Tensor:
        """From what was seen to each candidate's h1 behind the text (R, K)."""
        pieces = [
            self._knowledge.sent(_tried(self._bottom, self._cache, ids_RK)) - seen_RD[:, None]
            for ids_RK in tried_RK.split(TRIED, 1)
        ]
        return torch.cat([piece.norm(dim=2) for piece in pieces], 1)


def _table(bottom: Part, knowledge: Knowledge) -> tuple[Tensor, Tensor]:
    """h1 of each token behind some text (V, D), about as it is behind any other, no axis of it
    larger than others; and what each axis was divided by (D,)."""
    cache = PartCache(bottom.config, bottom.blocks)
    bottom(torch.tensor([list(knowledge.public[0][:PREFIX])]), cache=cache)
    pieces_1VK = torch.arange(knowledge.vocabulary)[None].split(TRIED, 1)
    list_VD = torch.cat([knowledge.sent(_tried(bottom, cache, ids))[0] for ids in pieces_1VK])
    scale_D = list_VD.std(0)
    return list_VD / scale_D, scale_D


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

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        for _, cache in self._rest:
            cache.keep(rows, cache.length)

    def likeliest(self, count: int) -> Tensor | None:
        """So many tokens that are expected most (B, K); None where nothing is expected."""
        if self._expected_BV is None:
            return None
        return self._expected_BV.topk(count).indices

    def scores(self, distances_BK: Tensor, tried_BK: Tensor) -> Tensor:
        """Less is likelier (B, K): distances, or by Gaussian noise and the model's expectation."""
        if not self._noise:
            return distances_BK.square()
        if self._expected_BV is None:
            return distances_BK.square() / (2 * self._noise**2)
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
