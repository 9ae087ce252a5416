"""Server optimizers: how far the federation's tensors go towards the clients' mean.

The arithmetic is Flower's own: `FedAvgM` (Hsu et al. 2019, arXiv:1909.06335), `FedAdam` and
`FedYogi` (Reddi et al. 2021, arXiv:2003.00295), given a mean that exists already. As they are in
Flower: moments start at zero, and FedAdam corrects its bias with ``beta ** (round + 1)``, rounds
counted from one; the paper does neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi
from torch import Tensor

from conf.schema import AggregationConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOMENTS = ("momentum_vector", "m_t", "v_t")
"""Flower's names for what an optimizer remembers: FedAvgM one moment, the others two."""


class _Given(FedAvg):
    """Stands before FedAvg in the order of base classes: the mean was worked out elsewhere."""

    mean: ArrayRecord

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean."""
        return self.mean, None


class _Momentum(FedAvgM, _Given):
    pass


class _Adam(FedAdam, _Given):
    pass


class _Yogi(FedYogi, _Given):
    pass


class ServerOptimizer:
    """One of Flower's server optimizers over named tensors.

    Parameters
    ----------
    settings : AggregationConfig
        Names the optimizer and its settings.
    """

    def __init__(self, settings: AggregationConfig) -> None:
        self._flower: Any
        if settings.optimizer == "fedavgm":
            self._flower = _Momentum(
                server_learning_rate=settings.rate, server_momentum=settings.momentum
            )
        else:
            kind = {"fedadam": _Adam, "fedyogi": _Yogi}[settings.optimizer]
            beta_1, beta_2 = settings.betas
            self._flower = kind(eta=settings.rate, beta_1=beta_1, beta_2=beta_2, tau=settings.tau)
        self._names: list[str] = []

    def step(
        self, round: int, current: Mapping[str, Tensor], mean: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Move `current` by the pseudo-gradient ``mean - current``.

        Parameters
        ----------
        round : int
            Counted from one; FedAdam corrects its bias with it.
        current : mapping
            What the clients started the round from.
        mean : mapping
            What they came to, on average; the same names and shapes, best in float64.

        Returns
        -------
        dict[str, Tensor]
            Worked out in float64, in the dtypes and on the devices of `current`.
        """
        if current.keys() != mean.keys():
            odd = sorted(current.keys() ^ mean.keys())[:5]
            raise ValueError(f"the server optimizer needs the mean of every tensor: {odd}")
        # FedAvgM pairs arrays by their position, the others by name.
        self._names = sorted(current)
        before = {name: _numpy(current[name]) for name in self._names}
        self._flower.mean = _record({name: _numpy(mean[name]) for name in self._names})
        momentum = isinstance(self._flower, FedAvgM)
        self._flower.current_arrays = _record(before) if momentum else before
        moved, _ = self._flower.aggregate_train(round, [])
        self._flower.mean = self._flower.current_arrays = None
        return {
            name: torch.from_numpy(moved[name].numpy()).to(current[name]) for name in self._names
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments, as ``moment/tensor``; they are replaced in a step, never changed."""
        state = {}
        for moment in MOMENTS:
            held = getattr(self._flower, moment, None) or {}
            named = held if isinstance(held, dict) else dict(zip(self._names, held, strict=True))
            for name, value in named.items():
                state[f"{moment}/{name}"] = torch.from_numpy(np.asarray(value))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state_dict` returned."""
        self._names = []
        for moment in MOMENTS:
            if not hasattr(self._flower, moment):
                continue
            prefix = f"{moment}/"
            held = {
                name.removeprefix(prefix): _numpy(state[name])
                for name in sorted(state)
                if name.startswith(prefix)
            }
            if moment == "momentum_vector":
                self._names = list(held)
            by_position = moment == "momentum_vector"
            setattr(self._flower, moment, (list(held.values()) if by_position else held) or None)


def build_server_optimizer(settings: AggregationConfig) -> ServerOptimizer | None:
    """The optimizer that `aggregation.optimizer` names; None for fedavg, the mean itself."""
    return None if settings.optimizer == "fedavg" else ServerOptimizer(settings)


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().to("cpu", torch.float64).numpy()


def _record(arrays: Mapping[str, NDArray[np.float64]]) -> ArrayRecord:
    return ArrayRecord({name: Array(a) for name, a in arrays.items()})
