"""The federation's tensors: a round's are averaged as the aggregator says, and kept.

A contribution is everything a client trained, by its name in the whole model, wherever it ran: the
ends at the client and, under splitfed-v1, its replica of the trunk at the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from conf.schema import Config
from models.residuals import RESIDUAL
from strategies.aggregate.aggregator import find_aggregator
from strategies.aggregate.lora import (
    A_NAME,
    B_NAME,
    Adapter,
    Layer,
    adapted,
    adapter_of,
    factor_error,
    form_but_rank,
    named,
)
from strategies.aggregate.masked import Masked
from strategies.aggregate.means import check_alike, refuse_infinite, shares_of
from strategies.aggregate.robust.deviation import anomalies, distances
from strategies.aggregate.robust.registry import find_robust
from strategies.aggregate.server_optim import build_server_optimizer

_TENSOR, _TOTAL, _OPTIMIZER = "tensor/", "total/", "optimizer/"


@dataclass(frozen=True)
class Contribution:
    """What one client trained in a round.

    Parameters
    ----------
    client : str
        Contributions are summed in the order of these names, so that arrival does not matter.
    weight : float
        Such as its trained tokens.
    state : mapping
        Every tensor it trained, by its name in the whole model; without those in `masked`.
    masked : Masked, optional
        Its ends, where the server may not read them.
    """

    client: str
    weight: float
    state: Mapping[str, Tensor]
    masked: Masked | None = None


@dataclass(frozen=True)
class Report:
    """How an aggregation went.

    Parameters
    ----------
    lora_error : float or None
        ``|aggregate - mean| / |mean|``, Frobenius norms over all adapted layers together, where
        ``mean`` is the clients' mean of what they added to the base weights, and ``aggregate`` is
        what a recipient adds, before a server optimizer moves it. None: no adapters.
    """

    lora_error: float | None
    anomalies: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By name, the clients that are far from the others: `distance` from the coordinates' median,
    and how many `times` the median client's distance that is."""


class GlobalState:
    """The federation's tensors.

    `update` averages contributions as `aggregation.lora` and `aggregation.optimizer` say; `tensors`
    gives a recipient its part. Tensors are replaced, never changed in place, and a refused update
    changes nothing.

    Parameters
    ----------
    config : Config
        `aggregation`, `lora` and the seed are read.
    """

    def __init__(self, config: Config) -> None:
        self._how, self._lora, self._seed = config.aggregation, config.lora, config.seed
        self._aggregator = find_aggregator(self._how.lora)()
        self._robust = find_robust(self._how)
        self._optimizer = build_server_optimizer(self._how)
        self._tensors: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}

    def start(self, initial: Mapping[str, Tensor]) -> None:
        """Set the tensors that the clients of the first round start from.

        Server optimizers need them; the names are those of the contributions to come.
        """
        self._tensors, self._totals = {k: v.detach().clone() for k, v in initial.items()}, {}
        self._optimizer = build_server_optimizer(self._how)

    def update(self, round: int, contributions: Sequence[Contribution]) -> Report:
        """Average the contributions of a round, and keep the result.

        Raises
        ------
        ValueError
            If there are none, their weights are unusable, their names or shapes differ, a value is
            not finite, ranks differ and the method cannot average them, or a server optimizer was
            given no start. Nothing is changed then.
        """
        cohort = _Cohort(contributions, frozen_A=self._aggregator.frozen_A)
        if self._tensors:
            who = ["the federation", *cohort.who]
            check_alike([self._tensors, *cohort.states], who, form_but_rank)
        check_alike(cohort.states, cohort.who, form_but_rank)
        if self._aggregator.by_product:
            report = self._average_products(cohort)
        else:
            report = self._average_factors(round, cohort)
        return replace(report, anomalies=anomalies(cohort.who, cohort.distances))

    def tensors(self, wanted: Callable[[str], bool], rank: int) -> dict[str, Tensor]:
        """Return what a recipient holds.

        Ask once for each rank in a round: another rank than the one held costs an SVD, a residual a
        product of the layer's size.

        Parameters
        ----------
        wanted : callable
            Whether the recipient holds the tensor of this name.
        rank : int
            Of the recipient's adapters.

        Returns
        -------
        dict[str, Tensor]
            Sharing memory with the state. With `aggregation.lora=exact`, ``LAYER.residual``, fp32
            of (outputs, inputs), is to be added to the layer's *original* weight; a layer without
            one has none to add.

        Raises
        ------
        ValueError
            If the adapters have another rank and the method cannot change it.
        """
        found = {name: tensor for name, tensor in self._tensors.items() if wanted(name)}
        for layer in adapted(found):
            if not self._aggregator.by_product:
                self._check_rank(layer, rank)
                continue
            held = self._layer(layer)
            found |= named(layer, held.at(rank))
            if self._aggregator.exact and (residual_OI := held.residual(rank)) is not None:
                found[layer + RESIDUAL] = residual_OI
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that `update` and `tensors` depend on, flat; sharing memory, so write or copy
        it before changing anything in place."""
        optimizer = self._optimizer.state_dict() if self._optimizer else {}
        return {
            **{_TENSOR + name: tensor for name, tensor in self._tensors.items()},
            **{_TOTAL + name: tensor for name, tensor in self._totals.items()},
            **{_OPTIMIZER + name: tensor for name, tensor in optimizer.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state_dict` returned.

        Raises
        ------
        ValueError
            If a name is of no kind that this configuration keeps.
        """
        parts: dict[str, dict[str, Tensor]] = {_TENSOR: {}, _TOTAL: {}, _OPTIMIZER: {}}
        for name, tensor in state.items():
            kind, slash, rest = name.partition("/")
            if kind + slash not in parts or (kind + slash == _OPTIMIZER and not self._optimizer):
                raise ValueError(
                    f"'{name}' is no part of a state with aggregation.lora={self._how.lora} and "
                    f"aggregation.optimizer={self._how.optimizer}"
                )
            parts[kind + slash][rest] = tensor
        self._tensors, self._totals = parts[_TENSOR], parts[_TOTAL]
        if self._optimizer:
            self._optimizer.load_state_dict(parts[_OPTIMIZER])

    def _average_products(self, cohort: _Cohort) -> Report:
        """Average what adapters add, and all other tensors as they are."""
        layers = {name: cohort.adapters(name) for name in cohort.layers}
        means, totals = self._aggregator.combine(cohort.plain(), cohort.shares, cohort.who), {}
        errors = squares = 0.0
        for name, adapters in layers.items():
            new, error, square = self._layer(name, like=adapters[0]).mean(
                adapters, cohort.shares, self._lora.rank, exact=self._aggregator.exact
            )
            errors, squares = errors + error, squares + square
            means |= named(name, new.adapter)
            if new.total_OI is not None:
                totals[name] = new.total_OI
        self._tensors, self._totals = {name: means[name] for name in cohort.states[0]}, totals
        return Report(_relative(errors, squares) if layers else None)

    def _average_factors(self, round: int, cohort: _Cohort) -> Report:
        """Average every tensor as it is, then let the server optimizer move towards the mean."""
        self._check_ranks(cohort)
        first, dtype = cohort.states[0], torch.float64 if self._optimizer else None
        means = self._combined(cohort, dtype)
        report = Report(self._factor_error(means, cohort))
        if self._optimizer:
            if not self._tensors:
                raise ValueError(
                    f"aggregation.optimizer={self._how.optimizer} moves tensors towards their "
                    "mean, and has none to move: start the state first"
                )
            check_alike([self._tensors, means], ["the federation", "the clients"])
            moved = self._optimizer.step(round, self._tensors, means)
            means = {name: moved[name].to(first[name].dtype) for name in first}
        self._tensors = means
        return report

    def _combined(self, cohort: _Cohort, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """One state of the cohort's: a robust one, or the aggregator's."""
        if self._robust is None:
            return self._aggregator.combine(cohort.states, cohort.shares, cohort.who, dtype)
        if len(cohort.who) < self._robust.least:
            raise ValueError(
                f"aggregation.robust={self._how.robust} with aggregation.byzantine="
                f"{self._how.byzantine} needs {self._robust.least} clients, and "
                f"{len(cohort.who)} answered: {', '.join(cohort.who)}"
            )
        for name in cohort.states[0]:
            refuse_infinite(name, cohort.states, cohort.who)
        return self._robust.combine(cohort.states, cohort.shares, cohort.distances)

    def _layer(self, name: str, like: Adapter | None = None) -> Layer:
        """What is held of a layer; if nothing is, one like this to which nothing was added."""
        if like is not None and name + A_NAME not in self._tensors:
            held = Adapter(like.A_rI, torch.zeros_like(like.B_Or))
        else:
            held = adapter_of(self._tensors, name, "the federation")
        total_OI, alpha = self._totals.get(name), self._lora.alpha
        return Layer(name=name, adapter=held, total_OI=total_OI, alpha=alpha, seed=self._seed)

    def _check_ranks(self, cohort: _Cohort) -> None:
        """Refuse adapters whose factors cannot be averaged one by one."""
        for layer in cohort.layers:
            ranks = {w: a.rank for w, a in zip(cohort.who, cohort.adapters(layer), strict=True)}
            if len(set(ranks.values())) > 1:
                told = ", ".join(f"{client} has {rank}" for client, rank in ranks.items())
                raise ValueError(
                    f"aggregation.lora={self._how.lora} averages factors, which must be of one "
                    f"rank; at '{layer}' {told}. {_REMEDY}"
                )

    def _check_rank(self, layer: str, rank: int) -> None:
        held = self._tensors[layer + B_NAME].shape[1]
        if held != rank:
            raise ValueError(
                f"'{layer}' has adapters of rank {held}, the recipient's are of rank {rank}, and "
                f"aggregation.lora={self._how.lora} cannot change it. {_REMEDY}"
            )

    def _factor_error(self, means: Mapping[str, Tensor], cohort: _Cohort) -> float | None:
        """Error of averaging factors; with A frozen and alike, that of B stands for it."""
        errors = squares = 0.0
        for layer in cohort.layers:
            mean = adapter_of(means, layer, "the mean", frozen_A=cohort.frozen_A)
            found = factor_error(mean, cohort.adapters(layer), cohort.shares, self._lora.alpha)
            errors, squares = errors + found[0], squares + found[1]
        return _relative(errors, squares) if cohort.layers else None


_REMEDY = "Set aggregation.lora=exact or svd, or give all clients one rank"


class _Cohort:
    """The contributions of a round in the order of their clients' names."""

    def __init__(self, contributions: Sequence[Contribution], *, frozen_A: bool) -> None:
        ordered = sorted(contributions, key=lambda contribution: contribution.client)
        self.who = [c.client for c in ordered]
        self.states = [c.state for c in ordered]
        self.shares = shares_of([c.weight for c in ordered], len(ordered))
        self.layers = adapted(self.states[0])
        self.frozen_A = frozen_A
        trained = [name for name in self.states[0] if frozen_A and name.endswith(A_NAME)]
        if trained:
            raise ValueError(
                f"aggregation.lora=ffa freezes lora_A, and {self.who[0]} has trained '{trained[0]}'"
            )

    @cached_property
    def distances(self) -> list[float]:
        """How far each client is from the coordinates' median."""
        return distances(self.states)

    def adapters(self, layer: str) -> list[Adapter]:
        """A layer's factors at every client; refused if a value is not finite."""
        found = [
            adapter_of(state, layer, client, frozen_A=self.frozen_A)
            for state, client in zip(self.states, self.who, strict=True)
        ]
        for end in (B_NAME,) if self.frozen_A else (A_NAME, B_NAME):
            refuse_infinite(layer + end, self.states, self.who)
        return found

    def plain(self) -> list[dict[str, Tensor]]:
        """Every client's tensors without the factors of adapters."""
        ends = (A_NAME, B_NAME)
        return [{n: t for n, t in s.items() if not n.endswith(ends)} for s in self.states]


def _relative(error: float, square: float) -> float:
    """Root of a quotient of squares; nothing off nothing is no error."""
    if not error:
        return 0.0
    return (error / square) ** 0.5 if square else float("inf")
