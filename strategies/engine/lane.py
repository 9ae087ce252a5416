"""What a policy gives a session to work with: one kind of lane for each way a trunk can learn.

A session calls, for each step, ``begin``, then ``forward`` and ``backward`` for each micro-batch,
then ``step``, and ``drop`` when the step is over, taken or not. It has checked order, shapes and
numbers before.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from strategies.engine.bench import Bench
from strategies.engine.checks import check_square, has_dropout
from strategies.engine.member import Member
from strategies.errors import TrunkError
from strategies.optim import Progress, add_proximal, clipped_step, learning_rate, square_norm


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step: gradient norm over all parts before clipping, and learning rate."""

    step: int
    grad_norm: float
    lr: float
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """With `train.sync=step`, the clients' common tensors after the step, or what changed of them:
    a tensor as a whole, or its `rows` (int64, in order)."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    since: Mapping[str, Tensor] | None = None
    """Those before the step, where the client has just these; None if it has others."""


class Lane:
    """A forward without a graph, for sessions that evaluate. Kinds that train build on it.

    Parameters
    ----------
    module : nn.Module
        Callable as ``module(h_BTD, mask_BT) -> h_BTD``.
    member : Member
        Whose lane it is.
    bench : Bench
        Where it is worked on.
    """

    takes_empty_steps: ClassVar[bool] = False
    """Whether a step may come in which this client has no example."""

    def __init__(self, module: nn.Module, member: Member, bench: Bench) -> None:
        self.module, self.member, self.bench = module, member, bench
        self.parameters: Sequence[nn.Parameter] = ()

    def begin(self) -> None:
        """Wait until a micro-batch may be worked on; `TrunkError` if that takes too long."""

    def forward(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, *, wanted: bool = True
    ) -> Tensor:
        """The trunk's output (B, T, D), detached; `wanted` says whether dL/dh1 will be."""
        with torch.no_grad():
            return self.bench.forward(self.module, h_BTD, mask_BT)

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor | None, *, last: bool, tokens: int
    ) -> tuple[Tensor | None, float]:
        """dL/dh1 (B, T, D) if it is wanted, and if `last` the squared norm of the trunk's gradient,
        else 0. The gradient may be missing where nothing learns from it."""
        raise TrunkError("this session evaluates: it has no backward", kind="order")

    def step(
        self, step: int, square: float, tokens: int, gradients: Mapping[str, Tensor]
    ) -> StepResult:
        """Clip by the norm over all parts, `square` being that of the client's, and step."""
        raise TrunkError("this session evaluates: it takes no step", kind="order")

    @property
    def ends(self) -> Mapping[str, Tensor]:
        """The clients' common tensors as they are now, where this step moves them."""
        return {}

    def drop(self) -> None:
        """Forget what is under way of a step; a second call does nothing."""

    def leave(self) -> None:
        """Say at once that this member does no more; a thread that waits in here learns so."""

    def close(self) -> None:
        """Give up for good, when nothing is at work here any more."""
        self.drop()


class OwnLane(Lane):
    """Trains its module with graphs and an optimizer that no other lane uses meanwhile.

    Parameters
    ----------
    module, member, bench :
        As for `Lane`.
    optimizer : torch.optim.Optimizer, optional
        None where nothing is trained.
    parameters : sequence of nn.Parameter
        What is trained.
    anchor : sequence of nn.Parameter, optional
        Their first values of the round, to which FedProx pulls.
    """

    def __init__(
        self,
        module: nn.Module,
        member: Member,
        bench: Bench,
        *,
        optimizer: torch.optim.Optimizer | None,
        parameters: Sequence[nn.Parameter],
        anchor: Sequence[nn.Parameter] | None = None,
    ) -> None:
        super().__init__(module, member, bench)
        self.parameters, self._optimizer, self._anchor = parameters, optimizer, anchor
        self._dropout = has_dropout(module)
        self._graphs: dict[int, tuple[Tensor, Tensor] | None] = {}
        """Input and output of each micro-batch under way; None where nothing learns from it."""
        self._square = 0.0

    def forward(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, *, wanted: bool = True
    ) -> Tensor:
        # A fresh leaf: the gradient with respect to it is what the client waits for. Where it waits
        # for none, autograd's graph begins at the first block that learns.
        h_in_BTD = h_BTD.detach().requires_grad_(wanted)
        if self._dropout:
            place = (self.member.client, step, micro, "trunk")
            h_out_BTD = self.bench.seeded_forward(
                self.module, h_in_BTD, mask_BT, self.member, *place
            )
        else:
            h_out_BTD = self.bench.forward(self.module, h_in_BTD, mask_BT)
        self._graphs[micro] = (h_in_BTD, h_out_BTD) if h_out_BTD.requires_grad else None
        return h_out_BTD.detach()

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor | None, *, last: bool, tokens: int
    ) -> tuple[Tensor | None, float]:
        grad_in_BTD = None
        if (graph := self._graphs.pop(micro)) is not None and grad_BTD is not None:
            h_in_BTD, h_out_BTD = graph
            torch.autograd.backward(h_out_BTD, grad_BTD.to(h_out_BTD.device, h_out_BTD.dtype))
            grad_in_BTD = input_gradient(h_in_BTD) if h_in_BTD.requires_grad else None
        if not last:
            return grad_in_BTD, 0.0
        if self._anchor is not None:
            add_proximal(self.parameters, self._anchor, self.bench.train.prox)
        self._square = square_norm(self.parameters)
        return grad_in_BTD, self._square

    def step(
        self, step: int, square: float, tokens: int, gradients: Mapping[str, Tensor]
    ) -> StepResult:
        norm = math.sqrt(self._square + square)
        check_square(step, self._square + square)
        train, round = self.bench.train, self.member.round
        here = Progress(round=round.number, rounds=round.rounds, step=step, steps=self.member.steps)
        lr = learning_rate(train, here, trunk=True)
        clipped_step(self._optimizer, lr=lr, norm=norm, clip=train.clip)
        return StepResult(step=step, grad_norm=norm, lr=lr)

    def drop(self) -> None:
        self._graphs.clear()

    def close(self) -> None:
        super().close()
        self._optimizer = None  # a replica waits for the round's end without its moments


def input_gradient(h_in_BTD: Tensor) -> Tensor:
    """dL/dh1 after a backward; `TrunkError` if none has reached the trunk's input."""
    if h_in_BTD.grad is None:
        raise TrunkError("no gradient reached the trunk's input; is this part differentiable?")
    return h_in_BTD.grad
