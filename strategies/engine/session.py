"""One client's work on the trunk during a round: forwards, backwards and steps, in order.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from strategies.engine.checks import check_finite, check_shapes, has_dropout, norm_error
from strategies.engine.policies.group import GATHER_SHARE
from strategies.engine.policies.registry import Lane
from strategies.errors import TrunkError
from strategies.optim import (
    Progress,
    add_proximal,
    autocast,
    clipped_step,
    learning_rate,
    square_norm,
)

if TYPE_CHECKING:
    from strategies.engine.engine import TrunkEngine

MAX_GRAPHS = 8
"""Micro-batches of one session whose graphs may wait for their backward at once."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """The round that is open: number (0 is the evaluation before training), and what it is for."""

    number: int
    rounds: int
    training: bool
    cohort: int = 0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step: gradient norm over all parts before clipping, and learning rate."""

    step: int
    grad_norm: float
    lr: float
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """With `train.sync=step`, the clients' common tensors after the step."""


@dataclass(eq=False)
class _Pending:
    """A forward that waits for its backward."""

    h_in_BTD: Tensor
    h_out_BTD: Tensor


class Session:
    """One client's forwards, backwards and steps during one round. Opened by `TrunkEngine.open`."""

    def __init__(
        self, engine: TrunkEngine, lane: Lane, round: Round, *, client: str, steps: int
    ) -> None:
        self._engine, self._lane, self.round = engine, lane, round
        self.client, self.steps = client, steps
        self.applied = 0
        self.tokens = 0
        self._pending: dict[int, _Pending] = {}
        self._gradients: dict[tuple[int, int], Tensor] = {}
        self._result: StepResult | None = None
        self._square_norm: float | None = None
        self._learnable = 0
        self._evaluated: dict[tuple[int, int], int] = {}
        self._held_bytes = 0
        self._declared = 0
        self._closed = False
        # The round may end (in Flower's thread) while this session works (in its stream's thread).
        self._busy = threading.Lock()
        self._dropout = round.training and has_dropout(lane.module)
        if lane.group is not None:
            lane.group.join(self, cohort=round.cohort, patience=engine.timeout * GATHER_SHARE)
        if lane.turn is not None:
            lane.turn.join(self, cohort=round.cohort, patience=engine.timeout * GATHER_SHARE)

    def compute(self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Run the trunk forward on one micro-batch.

        Parameters
        ----------
        step, micro : int
            The optimizer step, from 0, and the micro-batch within it, from 0. In evaluation any.
            One that waits for its backward is answered again, and runs once.
        h_BTD : Tensor
            The bottom's output, floating point.
        mask_BT : Tensor or None
            1 where there is a token, 0 where there is padding; None if nothing is padded.

        Returns
        -------
        Tensor
            The trunk's output, (B, T, D), without a graph; training keeps the graph here.

        Raises
        ------
        TrunkError
            A wrong shape, a step out of order, too much in flight, a closed session. Of kind
            `stale`, if it is of a step that lies behind: it came again.
        """
        self._check_open()
        self.check_shapes(tuple(h_BTD.shape), None if mask_BT is None else tuple(mask_BT.shape))
        if not h_BTD.is_floating_point():
            raise TrunkError(f"activations must be floating point, got {h_BTD.dtype}", kind="shape")
        check_finite(h_BTD, f"the tensor of activations of step {step}")
        h_BTD = h_BTD.to(self._engine.device)
        mask_BT = None if mask_BT is None else mask_BT.to(self._engine.device)
        if not self.round.training:
            self._evaluated[step, micro] = held_tokens(h_BTD, mask_BT)
            self.tokens = sum(self._evaluated.values())
            with torch.no_grad():
                return self._forward(h_BTD, mask_BT)
        self._check_step(step)
        if self._lane.turn is not None:
            self._lane.turn.take(self, self._engine.timeout)
        with self._working():
            return self._compute(step, micro, h_BTD, mask_BT)

    def _compute(self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        if micro in self._pending:  # its reply was lost
            return self._pending[micro].h_out_BTD.detach()
        if (step, micro) in self._gradients:
            raise TrunkError(f"step {step}, micro-batch {micro} has gone back", kind="stale")
        if micro >= (most := self._engine.max_micro_batches):
            raise TrunkError(
                f"micro-batch {micro} came; train.accumulate="
                f"{self._engine.train.accumulate} allows 0 to {most - 1}",
                kind="order",
            )
        if len(self._pending) >= self._engine.max_graphs:
            raise TrunkError(
                f"{len(self._pending)} micro-batches already wait for their backward; "
                f"at most {self._engine.max_graphs} may"
            )
        if self._square_norm is not None:
            raise TrunkError(f"step {step} had its last micro-batch: apply it", kind="order")
        self._engine.in_flight.take(h_BTD.nbytes)
        self._held_bytes += h_BTD.nbytes
        if self._lane.group is not None:
            h_in_BTD = h_BTD
            h_out_BTD = self._lane.group.forward(self, h_BTD, mask_BT)
        else:
            # A fresh leaf: the gradient with respect to it is what the client waits for.
            h_in_BTD = h_BTD.detach().requires_grad_()
            h_out_BTD = self.run(h_in_BTD, mask_BT, self.client, step, micro, "trunk")
        self._pending[micro] = _Pending(h_in_BTD, h_out_BTD)
        # No step can learn from more tokens than it holds: a client's weight is its tokens.
        self._learnable += held_tokens(h_BTD, mask_BT)
        return h_out_BTD.detach()

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, *, last: bool, tokens: int = 0
    ) -> tuple[Tensor, float]:
        """Run the trunk backward on one micro-batch; its gradients add up until `apply`.

        Parameters
        ----------
        step, micro : int
            As given to `compute`.
        grad_BTD : Tensor
            Gradient of the loss with respect to the trunk's output.
        last : bool
            True for the last micro-batch of the step.
        tokens : int
            Tokens that count in the step's loss, all micro-batches together: what the gradient
            weighs among those of other clients under `merged`.

        Returns
        -------
        grad_BTD : Tensor
            Gradient of the loss with respect to the trunk's input.
        square_norm : float
            Squared norm of the trunk's accumulated gradient if `last`, else 0. Under `merged` it is
            the gradient of the whole cohort's loss.
        """
        with self._working():
            return self._backward(step, micro, grad_BTD, last, tokens)

    def _backward(
        self, step: int, micro: int, grad_BTD: Tensor, last: bool, tokens: int
    ) -> tuple[Tensor, float]:
        if not self.round.training:
            raise TrunkError("this session evaluates: it has no backward", kind="order")
        self._check_step(step)
        if (step, micro) in self._gradients:  # its reply was lost
            return self._gradients[step, micro], self._square_norm or 0.0
        pending = self._pending.get(micro)
        if pending is None:
            raise TrunkError(
                f"step {step}, micro-batch {micro} has no forward to go back through", kind="order"
            )
        if grad_BTD.shape != pending.h_out_BTD.shape:
            raise TrunkError(
                f"gradient has shape {tuple(grad_BTD.shape)}, its activations had "
                f"{tuple(pending.h_out_BTD.shape)}",
                kind="shape",
            )
        check_finite(grad_BTD, f"the gradient of step {step}")
        if self._lane.group is not None:
            # The group keeps them as they went forward, whatever their numbers are.
            if micro != (due := next(iter(self._pending))):
                raise TrunkError(
                    f"micro-batch {micro} goes back before {due}; merged needs them in the order "
                    "of their forwards",
                    kind="order",
                )
            if not 0 < tokens <= self._most_tokens():
                raise TrunkError(f"step {step}: a gradient over {tokens} tokens cannot be weighed")
            grad_in, square = self._lane.group.backward(self, grad_BTD, tokens, last=last)
            self._declared = tokens
            del self._pending[micro]
        else:
            del self._pending[micro]
            grad_in, square = _back_through(pending, grad_BTD), 0.0
        self._gradients[step, micro] = grad_in
        if last:
            if self._pending:
                raise TrunkError(
                    f"step {step}: micro-batches {sorted(self._pending)} still wait for their "
                    "backward, so this one is not the last",
                    kind="order",
                )
            if self._lane.anchor is not None:
                add_proximal(self._lane.parameters, self._lane.anchor, self._engine.train.prox)
            merged = self._lane.group is not None
            self._square_norm = square if merged else square_norm(self._lane.parameters)
        return grad_in, self._square_norm or 0.0

    def get_gradients(self, step: int, micro: int) -> tuple[Tensor, float]:
        """The result of a `backward` again, until the next step is applied. Changes nothing."""
        self._check_open()
        try:
            return self._gradients[step, micro], self._square_norm or 0.0
        except KeyError:
            raise TrunkError(
                f"no gradient of step {step}, micro-batch {micro} is kept: step {self.applied} is "
                "the current one",
                kind="missing",
            ) from None

    def apply(
        self,
        step: int,
        *,
        client_square_norm: float,
        tokens: int,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> StepResult:
        """Clip by the norm over all parts and take the optimizer step; a repeated call repeats the
        result only.

        Parameters
        ----------
        step : int
            The step whose last micro-batch has gone back.
        client_square_norm : float
            Squared norm of the gradients of bottom and top.
        tokens : int
            Tokens that counted in the step's loss. 0 if this client has no example in a `merged`
            step: then nothing goes before the call.
        gradients : mapping, optional
            With `train.sync=step`, the gradients of bottom and top by global name.
        """
        with self._working():
            if self._result is not None and step == self._result.step:
                return self._result
            self._check_apply(step, client_square_norm, tokens)
            if self._lane.group is not None:
                norm, lr, state = self._lane.group.step(
                    self, client_square_norm, tokens, gradients or {}
                )
                self._result = StepResult(step=step, grad_norm=norm, lr=lr, state=state)
            else:
                self._result = self._apply(step, client_square_norm)
            self._finish_step()
            self.applied += 1
            self.tokens += tokens
            return self._result

    def _check_apply(self, step: int, client_square_norm: float, tokens: int) -> None:
        self._check_step(step)
        if not client_square_norm >= 0:
            raise TrunkError(f"a square norm cannot be {client_square_norm}")
        if not math.isfinite(client_square_norm):
            raise norm_error(step, client_square_norm)
        if self._lane.group is not None and tokens == 0 and not self._learnable:
            return
        if self._square_norm is None:
            raise TrunkError(f"step {step} has not had its last backward", kind="order")
        if not 0 < tokens <= self._learnable:
            raise TrunkError(
                f"step {step} reports {tokens} tokens; its micro-batches held {self._learnable}"
            )
        if self._lane.group is not None and tokens != self._declared:
            raise TrunkError(
                f"step {step} ends with {tokens} tokens, it began with {self._declared}"
            )

    def _apply(self, step: int, client_square_norm: float) -> StepResult:
        assert self._square_norm is not None
        norm = math.sqrt(self._square_norm + client_square_norm)
        if not math.isfinite(norm):
            raise norm_error(step, norm)
        progress = Progress(
            round=self.round.number, rounds=self.round.rounds, step=step, steps=self.steps
        )
        lr = learning_rate(self._engine.train, progress, trunk=True)
        clipped_step(self._lane.optimizer, lr=lr, norm=norm, clip=self._engine.train.clip)
        return StepResult(step=step, grad_norm=norm, lr=lr)

    def leave(self) -> None:
        """Say at once that this session does no more, though its thread may still be at work."""
        self._closed = True
        if self._lane.group is not None:
            self._lane.group.leave(self)
        if self._lane.turn is not None:
            self._lane.turn.leave(self)

    def close(self) -> None:
        """Drop what is in flight and give back the turn. The replica of the applied steps waits for
        the end of the round. A second call does nothing."""
        self.leave()
        with self._busy:
            if self._lane.turn is not None and self._lane.turn.held_by(self):
                for parameter in self._lane.parameters:
                    parameter.grad = None
            self._finish_step()
            self._lane.optimizer = None  # a replica waits for the round's end without its moments

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._busy:
            if self._closed and self._lane.turn is not None:
                self._lane.turn.release(self)
            self._check_open()
            yield

    @property
    def progress(self) -> tuple[int, ...]:
        """Changes with everything that a frame moves."""
        return self.applied, len(self._pending), len(self._gradients), int(self._closed)

    def _finish_step(self) -> None:
        self._declared = 0
        self._pending.clear()
        self._engine.in_flight.give_back(self._held_bytes)
        self._held_bytes = 0
        self._gradients.clear()
        self._square_norm = None
        self._learnable = 0
        if self._lane.turn is not None:
            self._lane.turn.release(self)

    def run(self, h_BTD: Tensor, mask_BT: Tensor | None, *seeds: object) -> Tensor:
        """The trunk's forward; its dropout depends on the round and `seeds`."""
        if not self._dropout:
            return self._forward(h_BTD, mask_BT)
        with self._engine.random(self.round.number, *seeds):
            return self._forward(h_BTD, mask_BT)

    def _forward(self, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        with autocast(self._engine.device, self._engine.train.precision):
            return self._lane.module(h_BTD, mask_BT)

    def _most_tokens(self) -> int:
        """More tokens than a step's micro-batches can hold are a lie."""
        engine = self._engine
        return engine.max_micro_batches * engine.max_sequences * engine.max_tokens

    def _check_open(self) -> None:
        if self._closed:
            raise TrunkError("the session is closed: its round has ended", kind="closed")

    def _check_step(self, step: int) -> None:
        if step < self.applied:
            raise TrunkError(
                f"step {step} came again, step {self.applied} is the current one", kind="stale"
            )
        if step != self.applied:
            raise TrunkError(f"step {step} came, step {self.applied} was due", kind="order")
        if step >= self.steps:
            raise TrunkError(f"step {step} exceeds the {self.steps} announced", kind="order")

    def check_shapes(self, shape: tuple[int, ...], mask_shape: tuple[int, ...] | None) -> None:
        """Refuse a shape before anything is made of it: activations (B, T, D) and mask (B, T)."""
        engine = self._engine
        check_shapes(shape, mask_shape, engine.hidden_size, engine.max_sequences, engine.max_tokens)

    def check_ends(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse gradients of the ends by name and shape, before any is read."""
        group = self._lane.group
        if group is not None and group.ends is not None and shapes:
            group.ends.check_shapes(shapes)
        elif shapes:
            raise TrunkError(
                f"gradients of {len(shapes)} of the ends' tensors came; without train.sync=step "
                "they stay with their client",
                kind="shape",
            )


def held_tokens(h_BTD: Tensor, mask_BT: Tensor | None) -> int:
    """Tokens of a micro-batch: those that are not padding."""
    return h_BTD.shape[0] * h_BTD.shape[1] if mask_BT is None else int(mask_BT.sum())


def _back_through(pending: _Pending, grad_BTD: Tensor) -> Tensor:
    grad_out = grad_BTD.to(pending.h_out_BTD.device, pending.h_out_BTD.dtype)
    torch.autograd.backward(pending.h_out_BTD, grad_out)
    grad_in = pending.h_in_BTD.grad
    if grad_in is None:
        raise TrunkError("no gradient reached the trunk's input; is this part differentiable?")
    return grad_in
