"""Weighted means of named tensors: the arithmetic of FedAvg, without any runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def weighted_mean(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Average named tensors: ``sum_k w_k * state_k / sum_k w_k`` (McMahan et al. 2017, FedAvg).

    The sum runs in float64 in the order given, so the same inputs give the same bits.

    Parameters
    ----------
    states : sequence of mapping
        One mapping of names to floating-point tensors per client, all of the same names and shapes.
    weights : sequence of float
        One finite weight >= 0 per client, such as its trained tokens; they need not sum to one.

    Returns
    -------
    dict[str, Tensor]
        New tensors of the inputs' shapes and dtypes, in the first state's order.

    Raises
    ------
    ValueError
        If there is nothing to average, the weights are unusable, the names or shapes differ, or a
        tensor holds a value that is not finite.
    """
    if not states:
        raise ValueError("nothing to average: no client state was given")
    if len(states) != len(weights):
        raise ValueError(f"{len(states)} states but {len(weights)} weights: give one for each")
    total = float(sum(weights))
    if any(not w >= 0 for w in weights) or not 0 < total < float("inf"):
        raise ValueError(f"weights must be finite, >= 0 and not all zero, got {list(weights)}")
    _check_alike(states)
    means: dict[str, Tensor] = {}
    for name, first in states[0].items():
        acc = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
        for state, weight in zip(states, weights, strict=True):
            acc.add_(state[name].to(torch.float64), alpha=weight / total)
        if not torch.isfinite(acc).all():
            raise ValueError(
                f"'{name}' of a client holds a value that is not finite; lower train.lr, or set "
                "train.clip"
            )
        means[name] = acc.to(first.dtype)
    return means


def _check_alike(states: Sequence[Mapping[str, Tensor]]) -> None:
    names = set(states[0])
    for position, state in enumerate(states[1:], start=1):
        if set(state) != names:
            odd = sorted(names.symmetric_difference(state))[:5]
            raise ValueError(f"client states 0 and {position} differ in names: {odd}")
        for name, tensor in state.items():
            if tensor.shape != states[0][name].shape:
                raise ValueError(
                    f"'{name}' has shape {tuple(tensor.shape)} at client {position} and "
                    f"{tuple(states[0][name].shape)} at client 0"
                )
