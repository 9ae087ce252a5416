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
from simulations.audit.attack import NotApplicable, Scores, TokenAttack
from simulations.audit.observation import (
    EXACT,
    STALE,
    START,
    Crossed,
    Knowledge,
    Observation,
    Truth,
)

ITERATIONS = 60
"""Of conjugate gradients. Noise is fitted by those that would follow."""
SLIGHT = 0.05
"""A remainder of a random vector of unit variance that is shorter than this is rounding."""


class Labels(TokenAttack):
    """Gradient matching at dL/dh2."""

    name = metric = "labels"
    reads = ("h2", "dL/dh2")
    levels: ClassVar[tuple[str, ...]] = (EXACT, STALE, START)
    ends = ("top",)
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

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`; of labels, not of what is read in h1."""
        scores = super().run(observation, knowledge, truth, rng)
        return {name.replace("tokens", "labels"): score for name, score in scores.items()}


def match(top: Part, crossed: Crossed) -> Tensor:
    """The label (B, T) of each position that explains its gradient best.

    Parameters
    ----------
    top : Part
        As the attacker has it.
    crossed : Crossed
        With h2 and dL/dh2.
    """
    system, z_BTD, logits_BTV, weight_VD = _solved(top, crossed)
    lost_BTKD = system.lost()
    prediction_BTV = logits_BTV.detach().float().softmax(-1)
    wanted_BTD = prediction_BTV @ weight_VD - z_BTD
    squares_BTV = torch.cdist(wanted_BTD, weight_VD).square()
    for lost_BTD in lost_BTKD.unbind(2):
        along_BTV = (wanted_BTD * lost_BTD).sum(-1, keepdim=True) - lost_BTD @ weight_VD.T
        squares_BTV = squares_BTV - along_BTV.square()
    return _likeliest(squares_BTV, wanted_BTD.shape[-1], prediction_BTV, crossed.mask_BT)


def head_gradients(top: Part, crossed: Crossed) -> Tensor:
    """The gradient at the head's input (B, T, D) that explains dL/dh2 best, times the tokens."""
    return _solved(top, crossed)[1]


def _solved(top: Part, crossed: Crossed) -> tuple[_System, Tensor, Tensor, Tensor]:
    """The system of a micro-batch, its solution z, and the head's output and weight."""
    assert crossed.grad_h2_BTD is not None
    h2_BTD = _leaf(crossed)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        hidden_BTD, logits_BTV, weight_VD = _run(top, h2_BTD, crossed.mask_BT)
        system = _System(h2_BTD, hidden_BTD)
        z_BTD = system.solve(crossed.grad_h2_BTD * max(1, crossed.tokens))
    return system, z_BTD, logits_BTV, weight_VD


def _leaf(crossed: Crossed) -> Tensor:
    """h2, with each text's first row where there is padding: of the zeros that are decoded there a
    norm has a derivative so steep that the system could not be solved."""
    assert crossed.h2_BTD is not None
    h2_BTD = crossed.h2_BTD
    if crossed.mask_BT is not None:
        h2_BTD = torch.where(crossed.mask_BT.bool()[..., None], h2_BTD, h2_BTD[:, :1])
    return h2_BTD.clone().requires_grad_()


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


class _System:
    """dL/dh2 as a function of z, the gradient at the head's input: linear, J'z."""

    def __init__(self, h2_BTD: Tensor, hidden_BTD: Tensor) -> None:
        self._h2_BTD, self._hidden_BTD = h2_BTD, hidden_BTD
        self._dummy_BTD = torch.zeros_like(hidden_BTD, requires_grad=True)
        (self._image_BTD,) = torch.autograd.grad(
            hidden_BTD, h2_BTD, self._dummy_BTD, create_graph=True
        )

    def apply(self, z_BTD: Tensor) -> Tensor:
        """J'z."""
        return torch.autograd.grad(self._hidden_BTD, self._h2_BTD, z_BTD, retain_graph=True)[0]

    def _forward(self, r_BTD: Tensor) -> Tensor:
        return torch.autograd.grad(self._image_BTD, self._dummy_BTD, r_BTD, retain_graph=True)[0]

    def solve(self, wanted_BTD: Tensor) -> Tensor:
        """The shortest z such that J'z is what is wanted."""
        return _conjugate(self.apply, self._forward, wanted_BTD)

    def lost(self) -> Tensor:
        """Unit vectors (B, T, K, D) of which J' keeps nothing, or zero: a norm before the head
        loses one direction, or two, which random vectors show."""
        generator = torch.Generator().manual_seed(0)
        found: list[Tensor] = []
        for _ in range(2):
            random_BTD = torch.randn(self._hidden_BTD.shape, generator=generator, device="cpu")
            random_BTD = random_BTD.to(self._hidden_BTD)
            left_BTD = random_BTD - self.solve(self.apply(random_BTD))
            for each_BTD in found:
                left_BTD = left_BTD - (left_BTD * each_BTD).sum(-1, keepdim=True) * each_BTD
            length_BT1 = left_BTD.norm(dim=-1, keepdim=True)
            found.append(torch.where(length_BT1 > SLIGHT, left_BTD / length_BT1, 0.0))
        return torch.stack(found, 2)


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
        going_B11 = now_B11 > 1e-10 * first_B11
        if not bool(going_B11.any()):
            break
        image_BTD = apply(way_BTD)
        # A sequence that has its solution would be led astray by rounding, while others go on.
        step_B11 = going_B11 * now_B11 / square(image_BTD).clamp_min(1e-30)
        z_BTD = z_BTD + step_B11 * way_BTD
        residual_BTD = residual_BTD - step_B11 * image_BTD
        slope_BTD = adjoint(residual_BTD)
        before_B11, now_B11 = now_B11, square(slope_BTD)
        way_BTD = slope_BTD + now_B11 / before_B11.clamp_min(1e-30) * way_BTD
    return z_BTD


def _likeliest(
    squares_BTV: Tensor, width: int, prediction_BTV: Tensor, mask_BT: Tensor | None
) -> Tensor:
    """The likeliest label of each position (B, T), were what is left of it Gaussian."""
    nearest_BT = squares_BTV.min(-1).values
    real_BT = torch.ones_like(nearest_BT) if mask_BT is None else mask_BT
    variance = float(nearest_BT[real_BT.bool()].median()) / width
    prior_BTV = prediction_BTV.clamp_min(1e-9).log()
    return (squares_BTV / (2 * max(variance, 1e-12)) - prior_BTV).argmin(-1)
