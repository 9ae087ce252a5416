"""Averaging what LoRA adapters add to a layer, not their factors.

An adapter adds ``s * B @ A`` to its layer, where ``s = alpha / rank``; the mean of products is no
product of means. Stacking the factors writes the mean as one product whose rank is the sum of the
clients' ranks: exact, and for mixed ranks too (FLoRA, Wang et al. 2024, arXiv:2409.05976). A
recipient's rank is smaller: a truncated SVD holds what it can, and a dense residual may hold the
rest (FedEx-LoRA, Singhal et al. 2024, arXiv:2410.09432).

Shapes: I inputs and O outputs of the layer, r rank of one adapter, N sum of the clients' ranks.
A residual is (O, I) whatever the layer is: GPT-2's ``Conv1D`` holds its weight as (I, O).

Stacked experts are so many layers: all shapes here may begin with E. Among named tensors E comes
after the rank, (r, E, I) and (O, r, E); `adapter_of` and `named` go there and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.adapters import initial_lora
from models.weights import ADAPTER, leading_experts

A_NAME = f".lora_A.{ADAPTER}.weight"
B_NAME = f".lora_B.{ADAPTER}.weight"
"""How the factors of an adapted layer are called, after the layer's name."""

ROW_NORM = 1 / math.sqrt(3)
"""Norm of a row of A as LoRA starts it: uniform within 1/sqrt(I), whatever I is."""
_ZERO = 1e-12


class Adapter(NamedTuple):
    """The factors of one layer."""

    A_rI: Tensor
    B_Or: Tensor

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A_rI.shape[-2]


def adapted(names: Iterable[str]) -> list[str]:
    """Return the layers of which these names hold an A or a B, sorted."""
    return sorted(
        {name.removesuffix(end) for name in names for end in (A_NAME, B_NAME) if name.endswith(end)}
    )


def adapter_of(
    state: Mapping[str, Tensor], layer: str, who: str, *, frozen_A: bool = False
) -> Adapter:
    """Read a layer's factors.

    Parameters
    ----------
    frozen_A : bool
        A is alike everywhere and in no state: the identity stands for it.

    Raises
    ------
    ValueError
        If one is missing, or their shapes do not make a product.
    """
    A, B = state.get(layer + A_NAME), state.get(layer + B_NAME)
    if frozen_A and A is None and B is not None and B.ndim in (2, 3):
        A = torch.eye(B.shape[1], device=B.device)
        A = A if B.ndim == 2 else A[:, None].expand(-1, B.shape[2], -1)
    if A is None or B is None:
        raise ValueError(f"{who} has only one of lora_A and lora_B for '{layer}'")
    fit = A.ndim == B.ndim and A.ndim in (2, 3) and A.shape[:1] == B.shape[1:2]
    if not fit or A.shape[1:-1] != B.shape[2:]:
        raise ValueError(
            f"{who}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of '{layer}' are "
            "not of one rank"
        )
    B_Or, A_rI = leading_experts(B, A)
    return Adapter(A_rI, B_Or)


def named(layer: str, adapter: Adapter) -> dict[str, Tensor]:
    """Return a layer's factors as they are called and laid out among named tensors."""
    A, B = adapter
    if A.ndim == 3:
        A, B = A.transpose(0, 1).contiguous(), B.permute(1, 2, 0).contiguous()
    return {layer + A_NAME: A, layer + B_NAME: B}


def form_but_rank(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor without the rank, if it is an A or a B."""
    if tensor.ndim in (2, 3) and name.endswith(A_NAME):
        return tuple(tensor.shape[1:])
    if tensor.ndim in (2, 3) and name.endswith(B_NAME):
        return (tensor.shape[0], *tensor.shape[2:])
    return tuple(tensor.shape)


def dense(adapter: Adapter, alpha: float) -> Tensor:
    """Return ``s * B @ A``, what an adapter adds to its layer: (O, I) in float64."""
    return (alpha / adapter.rank) * adapter.B_Or.double() @ adapter.A_rI.double()


def stack(
    adapters: Sequence[Adapter], shares: Sequence[float], alpha: float
) -> tuple[Tensor, Tensor]:
    """Write ``sum_k share_k * s_k * B_k @ A_k`` as one product.

    Returns
    -------
    tuple[Tensor, Tensor]
        (O, N) and (N, I) in float64.
    """
    scaled = [
        (share * alpha / adapter.rank) * adapter.B_Or.double()
        for adapter, share in zip(adapters, shares, strict=True)
    ]
    return torch.cat(scaled, dim=-1), torch.cat([a.A_rI.double() for a in adapters], dim=-2)


def product_norm(left_ON: Tensor, right_NI: Tensor) -> float:
    """Return the Frobenius norm of a product without forming it.

    The norm of ``R_left @ R_right.T``, from the QR of both; a Gram matrix would lose half the
    digits, and with them any error below 1e-8.
    """
    return float(torch.linalg.vector_norm(_core(left_ON, right_NI)[1]))


def project(
    left_ON: Tensor, right_NI: Tensor, *, rank: int, alpha: float, spare_rI: Tensor
) -> Adapter:
    """Return the adapter whose ``s * B @ A`` is closest to a product, in float64.

    The truncated SVD (Eckart and Young 1936), by QR of both factors and the SVD of the small core.
    A's rows get the norm with which LoRA starts them, so that B learns as fast as in a new adapter
    however small a direction's singular value is; B takes the rest. Where there is no direction
    left, A's row is a spare one and B's column zero: the product is the same, and it can learn.

    Parameters
    ----------
    left_ON, right_NI : Tensor
        Factors of the product, float64.
    rank : int
        Of the adapter; its scale is ``alpha / rank``.
    spare_rI : Tensor
        Initial A of such an adapter.
    """
    if left_ON.ndim == 3:
        experts = [
            project(left, right, rank=rank, alpha=alpha, spare_rI=spare)
            for left, right, spare in zip(left_ON, right_NI, spare_rI, strict=True)
        ]
        return Adapter(*(torch.stack(sides) for sides in zip(*experts, strict=True)))
    Q_left, core, Q_right = _core(left_ON, right_NI)
    U, sigma, V = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, int((sigma > _ZERO * sigma.max()).sum()) if sigma.numel() else 0)
    A_rI = spare_rI.double().clone()
    A_rI[:kept] = ROW_NORM * V[:kept] @ Q_right.T
    B_Or = left_ON.new_zeros(left_ON.shape[0], rank)
    B_Or[:, :kept] = Q_left @ U[:, :kept] * (sigma[:kept] * rank / (alpha * ROW_NORM))
    return Adapter(A_rI, B_Or)


def initial_A(layer: str, rank: int, inputs: int, seed: int, experts: Sequence[int] = ()) -> Tensor:
    """Return the A with which an adapter of this rank starts: (r, I) or (E, r, I), fp32."""
    like = nn.Parameter(torch.empty(rank, *experts, inputs, device="meta"))
    A = initial_lora(layer + A_NAME, like, seed)
    return A.transpose(0, 1) if experts else A


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the federation adds to one layer.

    Parameters
    ----------
    name : str
        Of the layer, as in the whole model.
    adapter : Adapter
        Factors at the rank at which they are held.
    total_OI : Tensor, optional
        All that is added, in fp32, if the factors alone do not say it (exact).
    alpha : float
        Of the adapters.
    seed : int
        Of their initial values.
    """

    name: str
    adapter: Adapter
    total_OI: Tensor | None = None
    alpha: float
    seed: int

    def at(self, rank: int) -> Adapter:
        """Return the factors for a recipient of this rank, in the dtype in which they are held."""
        A_rI, B_Or = self.adapter
        if rank == self.adapter.rank:
            return self.adapter
        left_ON, right_NI = stack([self.adapter], [1.0], self.alpha)
        found = self._project(left_ON, right_NI, rank)
        return Adapter(found.A_rI.to(A_rI.dtype), found.B_Or.to(B_Or.dtype))

    def residual(self, rank: int) -> Tensor | None:
        """Return what a recipient of this rank adds to the original weight beside its adapter.

        Returns
        -------
        Tensor or None
            (O, I), fp32: what the factors as sent, rounded as they are, do not hold. None: nothing.
        """
        total_OI = self.total_OI
        if total_OI is None and (rank == self.adapter.rank or not self.adapter.B_Or.any()):
            return None
        whole = dense(self.adapter, self.alpha) if total_OI is None else total_OI.double()
        return (whole - dense(self.at(rank), self.alpha)).float()

    def added(self, rank: int) -> Tensor:
        """Return all that a recipient of this rank adds to the original weight: (O, I), float64."""
        residual_OI, product_OI = self.residual(rank), dense(self.at(rank), self.alpha)
        return product_OI if residual_OI is None else product_OI + residual_OI.double()

    def mean(
        self, adapters: Sequence[Adapter], shares: Sequence[float], rank: int, *, exact: bool
    ) -> tuple[Layer, float, float]:
        """Average what adapters add that were trained from this layer.

        Parameters
        ----------
        adapters : sequence of Adapter
            Of any ranks; each was trained beside ``residual(its rank)``.
        shares : sequence of float
            Their weights, which sum to one.
        rank : int
            Least rank to hold: the SVD keeps as many directions as the widest adapter has. (Exact
            and of one rank: the factors' means are held, and the total says the rest.)
        exact : bool
            Whether a residual may hold what the rank cannot.

        Returns
        -------
        tuple[Layer, float, float]
            The new layer; the squared norm of the error at `rank`; the squared norm of the mean.
        """
        left_ON, right_NI = stack(adapters, shares, self.alpha)
        ranks = {adapter.rank for adapter in adapters}
        if exact and len(ranks) == 1:
            factors = Adapter(*(_mean(sides, shares) for sides in zip(*adapters, strict=True)))
        else:
            factors = self._project(left_ON, right_NI, max(ranks | {rank, self.adapter.rank}))
        first = adapters[0]
        held = Adapter(factors.A_rI.to(first.A_rI.dtype), factors.B_Or.to(first.B_Or.dtype))
        if not exact:
            layer = replace(self, adapter=held, total_OI=None)
            error = product_norm(*_difference(layer.at(rank), self.alpha, left_ON, right_NI))
            return layer, error**2, product_norm(left_ON, right_NI) ** 2
        mean_OI = left_ON @ right_NI
        for other in sorted(ranks):
            if (residual_OI := self.residual(other)) is not None:
                part = [s for s, a in zip(shares, adapters, strict=True) if a.rank == other]
                mean_OI.add_(residual_OI.double(), alpha=sum(part))
        layer = replace(self, adapter=held, total_OI=mean_OI.float())
        return layer, _square(layer.added(rank) - mean_OI), _square(mean_OI)

    def _project(self, left_ON: Tensor, right_NI: Tensor, rank: int) -> Adapter:
        *experts, _, inputs = right_NI.shape
        spare_rI = initial_A(self.name, rank, inputs, self.seed, experts).to(right_NI.device)
        return project(left_ON, right_NI, rank=rank, alpha=self.alpha, spare_rI=spare_rI)


def factor_error(
    aggregate: Adapter, adapters: Sequence[Adapter], shares: Sequence[float], alpha: float
) -> tuple[float, float]:
    """Squared norms of ``aggregate - mean`` and of the mean, as products with their scale."""
    left_ON, right_NI = stack(adapters, shares, alpha)
    error = product_norm(*_difference(aggregate, alpha, left_ON, right_NI))
    return error**2, product_norm(left_ON, right_NI) ** 2


def _difference(
    adapter: Adapter, alpha: float, left_ON: Tensor, right_NI: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of ``s * B @ A - left @ right``."""
    own_Or, own_rI = stack([adapter], [1.0], alpha)
    return torch.cat([own_Or, -left_ON], dim=-1), torch.cat([own_rI, right_NI], dim=-2)


def _core(left_ON: Tensor, right_NI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``left @ right = Q_left @ core @ Q_right.T`` with orthonormal columns in both Q."""
    Q_left, R_left = torch.linalg.qr(left_ON)
    Q_right, R_right = torch.linalg.qr(right_NI.mT)
    return Q_left, R_left @ R_right.mT, Q_right


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Weighted mean in float64."""
    terms = (share * tensor.double() for tensor, share in zip(tensors, shares, strict=True))
    return torch.stack(list(terms)).sum(0)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
