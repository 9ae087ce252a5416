"""Weighted means of named tensors: the arithmetic of FedAvg, without any runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def weighted_mean(
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    *,
    who: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Average named tensors: ``sum_k w_k * state_k / sum_k w_k`` (McMahan et al. 2017, FedAvg).

    The sum runs in float64 in the order given, so the same inputs give the same bits.

    Parameters
    ----------
    states : sequence of mapping
        One mapping of names to floating-point tensors per client, all of the same names and shapes.
    weights : sequence of float
        One finite weight >= 0 per client, such as its trained tokens; they need not sum to one.
    who : sequence of str, optional
        What errors call the clients; by default ``client 0``, ``client 1``, ...
    dtype : torch.dtype, optional
        Of the means; by default that of the first state.

    Returns
    -------
    dict[str, Tensor]
        New tensors of the inputs' shapes, in the first state's order.

    Raises
    ------
    ValueError
        If there is nothing to average, the weights are unusable, the names or shapes differ, or a
        tensor holds a value that is not finite.
    """
    shares = shares_of(weights, len(states))
    who = who or [f"client {position}" for position in range(len(states))]
    check_alike(states, who)
    means: dict[str, Tensor] = {}
    for name, first in states[0].items():
        acc = torch.zeros(first.shape, dtype=torch.float64, device=first.device)
        for state, share in zip(states, shares, strict=True):
            acc.add_(state[name].to(torch.float64), alpha=share)
        if not torch.isfinite(acc).all():
            refuse_infinite(name, states, who)
        means[name] = acc.to(dtype or first.dtype)
    return means


def shares_of(weights: Sequence[float], count: int) -> list[float]:
    """Divide each of `count` weights by their sum.

    Raises
    ------
    ValueError
        If there are none, their number is another, or they are not finite, >= 0 and not all zero.
    """
    if not count:
        raise ValueError("nothing to average: no client state was given")
    if count != len(weights):
        raise ValueError(f"{count} states but {len(weights)} weights: give one for each")
    total = float(sum(weights))
    if any(not w >= 0 for w in weights) or not 0 < total < float("inf"):
        raise ValueError(f"weights must be finite, >= 0 and not all zero, got {list(weights)}")
    return [weight / total for weight in weights]


def shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor, whatever its name."""
    return tuple(tensor.shape)


def check_alike(
    states: Sequence[Mapping[str, Tensor]],
    who: Sequence[str],
    form: Callable[[str, Tensor], tuple[int, ...]] = shape,
) -> None:
    """Refuse states whose names or forms differ from the first one's, with a ``ValueError``.

    Parameters
    ----------
    form : callable
        What of a tensor must be alike, from its name and itself; by default its shape.
    """
    for client, state in zip(who, states, strict=True):
        if odd := sorted(state.keys() ^ states[0].keys()):
            raise ValueError(f"{who[0]} and {client} differ in names of tensors: {odd[:5]}")
        for name, tensor in state.items():
            if form(name, tensor) != form(name, states[0][name]):
                raise ValueError(
                    f"'{name}' has shape {tuple(tensor.shape)} at {client} and "
                    f"{tuple(states[0][name].shape)} at {who[0]}"
                )


def refuse_infinite(name: str, states: Sequence[Mapping[str, Tensor]], who: Sequence[str]) -> None:
    """Raise a ``ValueError`` that says whose tensor `name` is not finite, if one is not."""
    for client, state in zip(who, states, strict=True):
        if not torch.isfinite(state[name]).all():
            raise ValueError(
                f"'{name}' of {client} holds a value that is not finite; lower train.lr, or set "
                "train.clip"
            )
