"""The defence `nopeek`: the bottom learns to say less of its tokens, by a term beside the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from flower_app.client.defences.defence import Defence

MOST_ROWS = 256
"""Rows that are compared with each other in one micro-batch, drawn evenly."""


class NoPeek(Defence):
    """Adds `privacy.weight` times the distance correlation of h1 and the tokens to the loss.

    Distance correlation is 0 for what is independent, and 1 for what can be turned, moved and
    scaled into each other. Tokens stand for themselves: two are as far apart as random directions,
    or not at all.

    It cannot help against who has this very bottom: other activations that still tell texts
    apart are found by trying them out.

    References
    ----------
    Vepakomma et al., "NoPeek: Information leakage reduction to share activations in distributed
    deep learning", 2020; Szekely et al., "Measuring and testing dependence by correlation of
    distances", 2007.
    """

    name = "nopeek"

    def penalty(self, h1_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor | None:
        """See `Defence.penalty`."""
        here_N = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        rows_N = here_N.flatten().bool().nonzero()[:, 0]
        rows_N = rows_N[:: 1 + len(rows_N) // MOST_ROWS]
        h1_ND, ids_N = h1_BTD.flatten(0, 1)[rows_N].float(), ids_BT.flatten()[rows_N]
        differ_NN = (ids_N[:, None] != ids_N[None]).to(h1_ND)
        return self.config.weight * distance_correlation(_distances(h1_ND), differ_NN)


def distance_correlation(a_NN: Tensor, b_NN: Tensor) -> Tensor:
    """Of two matrices of distances between the same N things; a scalar from 0 to 1."""
    a_NN, b_NN = _centred(a_NN), _centred(b_NN)
    both, own_a, own_b = (a_NN * b_NN).mean(), a_NN.square().mean(), b_NN.square().mean()
    return both.clamp_min(0.0).add(1e-12).sqrt() / (own_a * own_b).clamp_min(1e-24).sqrt().sqrt()


def _distances(rows_ND: Tensor) -> Tensor:
    square_NN = (rows_ND[:, None] - rows_ND[None]).square().sum(-1)
    return square_NN.clamp_min(1e-12).sqrt()


def _centred(distances_NN: Tensor) -> Tensor:
    return (
        distances_NN
        - distances_NN.mean(0, keepdim=True)
        - distances_NN.mean(1, keepdim=True)
        + distances_NN.mean()
    )
