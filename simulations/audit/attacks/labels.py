"""Labels from dL/dh2, by gradient matching with the known top.

What reaches the head's input is z = W'(p - y) / N: p the prediction, which follows from h2, y the
label's one-hot vector, W the head. dL/dh2 is linear in z: the Jacobian of the top up to its head,
transposed. So the system is solved for z by conjugate gradients, and the label is the row of W that
is nearest to W'p - N z. What the gradient leaves open (noise, a coarse codec) the prediction
itself decides: each row's distance is weighed against its probability.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flower_app.data.client import Batch
from models import Part
from simulations.audit.attack import NotApplicable, TokenAttack
from simulations.audit.observation import EXACT, STALE, START, Crossed, Knowledge, Observation

ITERATIONS = 60
"""Of conjugate gradients. Noise is fitted by those that would follow."""


class Labels(TokenAttack):
    """Gradient matching at dL/dh2."""

    name = "labels"
    reads = ("h2", "dL/dh2")
    levels: ClassVar[tuple[str, ...]] = (EXACT, STALE, START)
    finds = 0.9

    def guess(
        self, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
    ) -> Sequence[Tensor]:
        """See `TokenAttack.guess`."""
        found = []
        for crossed in observation.crossed:
            if crossed.grad_h2_BTD is None or crossed.h2_BTD is None:
                raise NotApplicable("no dL/dh2 crossed: neither trunk nor bottom learns")
            _, top = knowledge.ends(crossed)
            labels_BT = match(top, crossed)
            nothing_B1 = torch.full_like(labels_BT[:, :1], -1)
            found.append(torch.cat([nothing_B1, labels_BT[:, :-1]], 1))
        return found

    def targets(self, batch: Batch) -> Tensor:
        """The labels that count; the first token is nobody's label."""
        return batch.labels


def match(top: Part, crossed: Crossed) -> Tensor:
    """The label (B, T) of each position that explains its gradient best.

    Parameters
    ----------
    top : Part
        As the attacker has it.
    crossed : Crossed
        With h2 and dL/dh2.
    """
    assert crossed.h2_BTD is not None
    assert crossed.grad_h2_BTD is not None
    h2_BTD = crossed.h2_BTD.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        hidden_BTD, logits_BTV, weight_VD = _run(top, h2_BTD, crossed.mask_BT)
        z_BTD = _solve(h2_BTD, hidden_BTD, crossed.grad_h2_BTD * max(1, crossed.tokens))
    prediction_BTV = logits_BTV.detach().float().softmax(-1)
    wanted_BTD = prediction_BTV @ weight_VD - z_BTD
    return _nearest(wanted_BTD, weight_VD, prediction_BTV, crossed.mask_BT)


def _run(top: Part, h2_BTD: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The head's input, its output, and its weight."""
    head = top.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise NotApplicable("this model has no linear head")
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        logits_BTV = top(h2_BTD, mask_BT)
    finally:
        hook.remove()
    return seen[0], logits_BTV, head.weight.detach().float()


def _solve(h2_BTD: Tensor, hidden_BTD: Tensor, wanted_BTD: Tensor) -> Tensor:
    """z such that J'z is what is wanted, by conjugate gradients on the normal equations."""
    dummy_BTD = torch.zeros_like(hidden_BTD, requires_grad=True)
    (image_BTD,) = torch.autograd.grad(hidden_BTD, h2_BTD, dummy_BTD, create_graph=True)

    def transposed(z_BTD: Tensor) -> Tensor:
        return torch.autograd.grad(hidden_BTD, h2_BTD, z_BTD, retain_graph=True)[0]

    def forward(r_BTD: Tensor) -> Tensor:
        return torch.autograd.grad(image_BTD, dummy_BTD, r_BTD, retain_graph=True)[0]

    return _conjugate(transposed, forward, wanted_BTD)


def _conjugate(
    apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], wanted_BTD: Tensor
) -> Tensor:
    """Least squares of apply(z) = wanted, each sequence by itself: CGLS, Hestenes 1952."""

    def square(x_BTD: Tensor) -> Tensor:
        return x_BTD.square().sum((1, 2), keepdim=True)

    residual_BTD = wanted_BTD.clone()
    slope_BTD = adjoint(residual_BTD)
    z_BTD, way_BTD, now_B11 = torch.zeros_like(slope_BTD), slope_BTD.clone(), square(slope_BTD)
    first_B11 = now_B11.clamp_min(1e-30)
    for _ in range(ITERATIONS):
        image_BTD = apply(way_BTD)
        step_B11 = now_B11 / square(image_BTD).clamp_min(1e-30)
        z_BTD = z_BTD + step_B11 * way_BTD
        residual_BTD = residual_BTD - step_B11 * image_BTD
        slope_BTD = adjoint(residual_BTD)
        before_B11, now_B11 = now_B11, square(slope_BTD)
        if bool((now_B11 <= 1e-10 * first_B11).all()):
            break
        way_BTD = slope_BTD + now_B11 / before_B11.clamp_min(1e-30) * way_BTD
    return z_BTD


def _nearest(
    wanted_BTD: Tensor, weight_VD: Tensor, prediction_BTV: Tensor, mask_BT: Tensor | None
) -> Tensor:
    """The likeliest row of the head for each position (B, T), were the error Gaussian."""
    squares_BTV = torch.cdist(wanted_BTD, weight_VD).square()
    nearest_BT = squares_BTV.min(-1).values
    real_BT = torch.ones_like(nearest_BT) if mask_BT is None else mask_BT
    variance = float(nearest_BT[real_BT.bool()].median()) / wanted_BTD.shape[-1]
    prior_BTV = prediction_BTV.clamp_min(1e-9).log()
    return (squares_BTV / (2 * max(variance, 1e-12)) - prior_BTV).argmin(-1)
