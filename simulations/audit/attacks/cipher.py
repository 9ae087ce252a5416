"""Tokens from h1 read as a substitution cipher, for who knows nothing of the ends.

Equal tokens look about alike wherever they stand, whatever their vectors are. So h1 of a whole
round falls into clusters: the signs of a cipher in which each token has several. Which sign is
which token follows from what follows what in public text, as in a homophonic cipher (Ravi and
Knight 2011, "Bayesian inference for Zodiac and other homophonic ciphers"): by Gibbs sampling that
cools down, of readings whose trigrams are likely. Of several readings the one counts that reads as
the same token what looks most alike.

Shapes: N positions of all texts, B texts, T positions of one, D hidden size, A axes, C signs,
S tokens that public text has, W windows of three.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq
from torch import Tensor

from conf.schema import Config
from flower_app.data.client import load_tokenizer
from simulations.audit.attack import NotApplicable, TokenAttack
from simulations.audit.observation import PUBLIC, Crossed, Knowledge, Observation
from simulations.audit.recording import Scope

AXES, SIGNS = 128, 192
"""Principal axes of h1 that are kept, each made as wide as any other, and clusters in them."""
BEGINNING = 2048
"""Positions by which clusters begin."""
TOKENS = 512
"""Of a vocabulary at most: what follows what is a table of their cube's size."""
BELIEF = 5.0
"""Of how many observations the expectation of a shorter context is worth."""
SWEEPS, HOT, STILL = 100, 30.0, 3
"""Of the sampler over all signs; its temperature at first; the last ones, that take the best."""
READINGS = 8
"""That are made."""

Array = NDArray[Any]


class Cipher(TokenAttack):
    """Clusters of h1 as signs, told by their order."""

    name = "cipher"
    reads = ("h1",)
    levels: ClassVar[tuple[str, ...]] = (PUBLIC,)
    finds = 0.6

    def guess(
        self, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `TokenAttack.guess`."""
        language = Language(knowledge.public)
        signs = Signs(observation.heard, rng)
        ids_C = language.ids_S[read(signs, language, rng)]
        found = []
        for crossed in observation.crossed:
            assert crossed.h1_BTD is not None
            found.append(torch.from_numpy(ids_C[signs.of(crossed.h1_BTD)]))
        return found

    def planted(self, config: Config, scope: Scope) -> tuple[Config, Scope]:
        """What crosses is the embedding alone, so that equal tokens are one sign, of the run's
        first steps, of which it needs some."""
        _check_small(len(load_tokenizer(config.model)))
        cut, tuning = replace(config.cut, bottom=0), replace(config.tuning, bottom="frozen")
        scope = Scope(clients=1, warm=0, steps=8, sequences=4)
        return replace(config, cut=cut, tuning=tuning), scope


class Language:
    """What follows what in public text.

    Parameters
    ----------
    public : sequence of sequences of int
        Ids.

    Raises
    ------
    NotApplicable
        If too many of them are different.
    """

    def __init__(self, public: Sequence[Sequence[int]]) -> None:
        flat_N = np.concatenate([np.asarray(text) for text in public])
        self.ids_S, at_N = np.unique(flat_N, return_inverse=True)
        S = len(self.ids_S)
        _check_small(S)
        two_SS, three_SSS = np.zeros((S, S)), np.zeros((S, S, S))
        for text_T in np.split(at_N, np.cumsum([len(text) for text in public])[:-1]):
            np.add.at(two_SS, (text_T[:-1], text_T[1:]), 1)
            np.add.at(three_SSS, (text_T[:-2], text_T[1:-1], text_T[2:]), 1)
        self.share_S = np.bincount(at_N, minlength=S) / len(at_N)
        expected_SSS = _smoothed(three_SSS, _smoothed(two_SS, self.share_S))
        self.logs_SSS = np.log(expected_SSS).astype(np.float32)
        """Log-probability of the third token behind the first two."""


def _check_small(vocabulary: int) -> None:
    if vocabulary > TOKENS:
        raise NotApplicable(
            f"there are {vocabulary} tokens, and what follows what is a table of {TOKENS} at most: "
            "only small vocabularies, as bytes, are read as a cipher"
        )


def _smoothed(counts: Array, expected: Array) -> Array:
    return (counts + BELIEF * expected) / (counts.sum(-1, keepdims=True) + BELIEF)  # type: ignore[no-any-return]


class Signs:
    """Clusters of what crossed, and the order in which they came.

    Parameters
    ----------
    heard : sequence of Crossed
        h1 of a round.
    rng : Generator
        Of the clusters' beginnings.

    Raises
    ------
    NotApplicable
        If no h1 crossed.
    """

    def __init__(self, heard: Sequence[Crossed], rng: np.random.Generator) -> None:
        texts = [h_TD.double() for each in heard for h_TD in each.texts()]
        if not texts:
            raise NotApplicable("no h1 crossed")
        rows_ND = torch.cat(texts)
        self._mean_D = rows_ND.mean(0)
        _, spread_A, axes_AD = torch.linalg.svd(rows_ND - self._mean_D, full_matrices=False)
        kept = min(AXES, int((spread_A > 1e-6 * spread_A[0]).sum()))
        self._axes_DA = axes_AD[:kept].T / spread_A[:kept] * len(rows_ND) ** 0.5
        self.rows_NA = self._even(rows_ND)
        """Whitened."""
        self._centres_CA, signs_N = _clusters(self.rows_NA, rng)
        self.texts: list[Array] = np.split(signs_N, np.cumsum([len(text) for text in texts])[:-1])
        """The sign of each position (T,), of each text, without padding."""

    def _even(self, rows_ND: Tensor) -> Array:
        return ((rows_ND.cpu().double() - self._mean_D) @ self._axes_DA).numpy()  # type: ignore[no-any-return]

    def of(self, h_BTD: Tensor) -> Array:
        """The sign of each position (B, T)."""
        signs_N, _ = vq(self._even(h_BTD.flatten(0, 1)), self._centres_CA)
        return signs_N.reshape(h_BTD.shape[:2])  # type: ignore[no-any-return]

    def alike(self, tokens_N: Array) -> float:
        """How alike positions are that are read as the same token: the log-likelihood of normal
        noise around each token's mean, but for a constant."""
        of_SN = np.eye(int(tokens_N.max()) + 1)[:, tokens_N]
        counts_S1 = of_SN.sum(1, keepdims=True)
        means_SA = of_SN @ self.rows_NA / np.maximum(counts_S1, 1.0)
        left_NA = self.rows_NA - means_SA[tokens_N]
        spread_AA = left_NA.T @ left_NA / len(left_NA) + 1e-3 * np.eye(left_NA.shape[1])
        return -0.5 * len(left_NA) * float(np.linalg.slogdet(spread_AA)[1])


def _clusters(rows_NA: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Centres (C, A), none of which is empty, and the cluster (N,) of each row: k-means."""
    # A beginning by k-means++ takes its time: of some rows it is as good. Where equal tokens are
    # equal rows there are fewer than clusters.
    begun_CA = np.unique(rows_NA[rng.permutation(len(rows_NA))[:BEGINNING]].round(6), axis=0)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of an empty cluster
        if len(begun_CA) > SIGNS:
            begun_CA, _ = kmeans2(begun_CA, SIGNS, minit="++", rng=rng)
        centres_CA, clusters_N = kmeans2(rows_NA, begun_CA, minit="matrix", iter=20)
    used_C, clusters_N = np.unique(clusters_N, return_inverse=True)
    return centres_CA[used_C], clusters_N


def read(signs: Signs, language: Language, rng: np.random.Generator) -> Array:
    """The token (C,), as a place in `Language.ids_S`, that each sign is read as."""
    sampler, signs_N = _Sampler(signs.texts, language), np.concatenate(signs.texts)
    readings = [sampler.run(rng) for _ in range(READINGS)]
    return max(readings, key=lambda tokens_C: signs.alike(tokens_C[signs_N]))


class _Sampler:
    """Which token each sign is, by annealed Gibbs sampling."""

    def __init__(self, texts: Sequence[Array], language: Language) -> None:
        self._language = language
        self._counts_C = np.bincount(np.concatenate(texts))
        windows = [np.lib.stride_tricks.sliding_window_view(t, 3) for t in texts if len(t) >= 3]
        if not windows:
            raise NotApplicable("no text has three tokens")
        self._windows_W3, self._times_W = np.unique(
            np.concatenate(windows), axis=0, return_counts=True
        )
        # With the axis of the token that is sought last, where numbers lie side by side.
        self._logs = [
            np.ascontiguousarray(np.moveaxis(language.logs_SSS, place, -1)) for place in range(3)
        ]
        self._parts = [self._parted(sign) for sign in range(len(self._counts_C))]

    def _parted(self, sign: int) -> tuple[list[Array], Array]:
        """The windows that have a sign once, by its place in them, and those that have it again."""
        has_W3 = self._windows_W3 == sign
        times_W = has_W3.sum(1)
        once = [np.flatnonzero(has_W3[:, place] & (times_W == 1)) for place in range(3)]
        return once, np.flatnonzero(times_W > 1)

    def run(self, rng: np.random.Generator) -> Array:
        """A reading (C,)."""
        C, S = len(self._counts_C), len(self._language.ids_S)
        tokens_C = rng.choice(S, size=C, p=self._language.share_S)
        totals_S = np.bincount(tokens_C, weights=self._counts_C, minlength=S)
        for sweep in range(SWEEPS):
            heat = max(1.0, HOT + (1.0 - HOT) * sweep / (0.9 * SWEEPS))
            for sign in rng.permutation(C):
                totals_S[tokens_C[sign]] -= self._counts_C[sign]
                scores_S = self._scores(sign, tokens_C, totals_S)
                if sweep < SWEEPS - STILL:
                    # The largest of scores with Gumbel noise is a sample of their softmax.
                    scores_S = scores_S / heat + rng.gumbel(size=S)
                tokens_C[sign] = scores_S.argmax()
                totals_S[tokens_C[sign]] += self._counts_C[sign]
        return tokens_C

    def _scores(self, sign: int, tokens_C: Array, totals_S: Array) -> Array:
        """The log-likelihood (S,) of each token for a sign, the others being what they are, but
        for a constant."""
        once, again = self._parts[sign]
        follows_S = np.zeros(len(totals_S))
        for place, at in enumerate(once):
            first_W, second_W = np.delete(tokens_C[self._windows_W3[at]], place, 1).T
            follows_S += self._times_W[at] @ self._logs[place][first_W, second_W]
        states_S1 = np.arange(len(totals_S))[:, None]
        one, two, three = (
            np.where(signs_W == sign, states_S1, tokens_C[signs_W])
            for signs_W in self._windows_W3[again].T
        )
        follows_S += self._language.logs_SSS[one, two, three] @ self._times_W[again]
        # A token that has many signs shows each seldom: n log n less, n being how often it comes.
        with_S = totals_S + self._counts_C[sign]
        return follows_S - _n_log_n(with_S) + _n_log_n(totals_S)  # type: ignore[no-any-return]


def _n_log_n(n_S: Array) -> Array:
    return n_S * np.log(np.maximum(n_S, 1.0))  # type: ignore[no-any-return]
