"""Sessions that work as one: their micro-batches run through the trunk as one batch.

Every session has its own thread, as under the other policies; here they meet. A session asks for
one thing at a time (a forward, a backward, a step) and waits; when all open sessions wait, what
they ask for is done for all at once. A session that ends or dies leaves, and nobody waits for it.

With every client present this is centralised training on the concatenated batch: gradients are
summed with the weights of the tokens, whoever has them.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import TrainConfig
from strategies.errors import TrunkError
from strategies.optim import (
    Progress,
    clipped_step,
    learning_rate,
    square_norm,
)

if TYPE_CHECKING:
    from strategies.engine.policies.merged import Ends
    from strategies.engine.session import Session

logger = logging.getLogger(__name__)

MAX_PADDING = 0.25
"""Largest share of a merged batch that padding to its longest member may take."""

GATHER_SHARE = 0.5
"""Of the engine's timeout: how long a round's first step waits for the whole cohort."""


@dataclass(eq=False)
class _Batch:
    """One merged forward whose graph waits for its backward."""

    h_in_BTD: Tensor
    h_out_BTD: Tensor


@dataclass(eq=False)
class _Rows:
    """A session's share of a batch."""

    batch: _Batch
    rows: slice
    tokens: int


@dataclass(eq=False)
class _Request:
    """What one session asks for, and the answer. `grad_BTD` is a part of it, known before."""

    member: Session
    kind: str
    payload: tuple[Any, ...]
    answer: Any = None
    grad_BTD: Tensor | None = None
    error: Exception | None = None
    done: bool = False


@dataclass(eq=False)
class Group:
    """The sessions of one round that work as one; see the module's text."""

    trunk_optimizer: torch.optim.Optimizer | None
    parameters: list[nn.Parameter]
    train: TrainConfig
    ends: Ends | None
    cohort: int = 0
    patience: float = 0.0
    steps: int = 0
    padded: int = 0
    positions: int = 0
    _members: dict[Session, _Request | None] = field(default_factory=dict)
    _rows: dict[Session, list[_Rows]] = field(default_factory=dict)
    _joined: int = 0
    _deadline: float | None = None
    _step: int = 0
    _tokens: dict[Session, int] = field(default_factory=dict)
    _reference: float = 0.0
    _trunk_square: float | None = None
    """None until the gradient of this step is whole: the last micro-batch of all has gone back."""
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def join(self, member: Session, *, cohort: int, patience: float) -> None:
        """Take part from the next step on."""
        with self._changed:
            if not self._joined:
                self.cohort, self.patience = cohort, patience
            self.steps = max(self.steps, member.steps)
            self._members[member] = None
            self._joined += 1

    def leave(self, member: Session) -> None:
        """Take part no longer; a thread of this session that waits here learns so at once."""
        with self._changed:
            request = self._members.pop(member, None)
            self._rows.pop(member, None)
            if request is not None and not request.done:
                request.error = TrunkError("the session has ended", kind="closed")
                request.done = True
            self._changed.notify_all()

    def miss(self) -> None:
        """Expect one session less."""
        with self._changed:
            self.cohort -= 1
            self._changed.notify_all()

    def forward(self, member: Session, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The trunk's output (B, T, D) for this session's micro-batch."""
        answer: Tensor = self._ask(_Request(member, "forward", (h_BTD, mask_BT)))
        return answer

    def backward(
        self, member: Session, grad_BTD: Tensor, tokens: int, *, last: bool
    ) -> tuple[Tensor, float]:
        """Go back through the session's micro-batch.

        Returns
        -------
        grad_BTD : Tensor
            dL/dh1 (B, T, D) of the session's own mean loss over its step's `tokens` tokens.
        square_norm : float
            If `last`, squared norm of the common trunk's gradient, for which all have come to
            their last micro-batch; else 0.
        """
        kind = "last backward" if last else "backward"
        answer: tuple[Tensor, float] = self._ask(_Request(member, kind, (grad_BTD, tokens)))
        return answer

    def step(
        self, member: Session, square: float, tokens: int, gradients: Mapping[str, Tensor]
    ) -> tuple[float, float, dict[str, Tensor]]:
        """Take the common step.

        Returns
        -------
        norm : float
            Gradient norm over all parts before clipping. With `train.sync=round` of the common
            trunk and this client's own ends.
        lr : float
            Learning rate of the trunk.
        state : dict[str, Tensor]
            With `train.sync=step`, the clients' tensors after the step.
        """
        if self.ends is not None and tokens:
            self.ends.check(gradients)
        answer: tuple[float, float, dict[str, Tensor]] = self._ask(
            _Request(member, "step", (square, tokens, gradients))
        )
        return answer

    def _ask(self, request: _Request) -> Any:
        with self._changed:
            if request.member not in self._members:
                raise TrunkError("the session has ended", kind="closed")
            self._members[request.member] = request
            if self._deadline is None:
                self._deadline = time.monotonic() + self.patience
            while not request.done:
                if self._all_wait():
                    self._serve()
                    self._changed.notify_all()
                else:
                    self._changed.wait(self._until_deadline())
            if request.error is not None:
                raise request.error
            return request.answer

    def _all_wait(self) -> bool:
        if any(request is None for request in self._members.values()):
            return False
        left = self._until_deadline()
        if self._joined >= self.cohort or left is None:
            return True
        if left > 0:
            return False
        self._deadline = math.inf
        logger.warning(
            "merged: %d of %d clients of the cohort have come within %.0f s; the others join when "
            "they do. In a simulation let all run at once (--federation-config "
            "'client-resources-num-cpus=1 init-args-num-cpus=%d'), or set link.transport=messages",
            *(self._joined, self.cohort, self.patience, self.cohort),
        )
        return True

    def _until_deadline(self) -> float | None:
        """Seconds until nobody waits for the whole cohort any more; None if nobody does."""
        if self._deadline is None or math.isinf(self._deadline) or self._joined >= self.cohort:
            return None
        return max(0.0, self._deadline - time.monotonic())

    def _serve(self) -> None:
        """Do for all members what the first kind of request asks; the others go on waiting."""
        waiting = [request for request in self._members.values() if request is not None]
        # By name, so that the sums do not depend on the order of arrival.
        waiting.sort(key=lambda request: request.member.client)
        for kind, work in (
            ("forward", self._forward),
            ("backward", self._backward),
            ("last backward", self._last_backward),
            ("step", self._take_step),
        ):
            chosen = [request for request in waiting if request.kind == kind]
            if not chosen:
                continue
            try:
                work(chosen)
            except (TrunkError, RuntimeError, ValueError) as error:
                for request in chosen:
                    request.error = error
            for request in chosen:
                request.done = True
                if self._members.get(request.member) is request:
                    self._members[request.member] = None
            return

    def _forward(self, requests: list[_Request]) -> None:
        for bucket in buckets(requests, lambda request: tuple(request.payload[0].shape[:2])):
            self._forward_bucket(bucket)

    def _forward_bucket(self, requests: list[_Request]) -> None:
        longest = max(request.payload[0].shape[1] for request in requests)
        parts, masks, start = [], [], 0
        for request in requests:
            h_BTD, mask_BT = request.payload
            sequences, tokens = h_BTD.shape[:2]
            missing = longest - tokens
            parts.append(F.pad(h_BTD.detach(), (0, 0, 0, missing)))
            mask_BT = (
                h_BTD.new_ones((sequences, tokens), dtype=torch.long)
                if mask_BT is None
                else mask_BT
            )
            masks.append(F.pad(mask_BT, (0, missing)))
            self.padded += sequences * missing
            self.positions += sequences * longest
        mask = torch.cat(masks)
        h_in = torch.cat(parts).requires_grad_()
        # Any member's forward is everybody's: they share the trunk and the round.
        first = requests[0].member
        place = (self._step, "merged", "+".join(request.member.client for request in requests))
        h_out = first.run(h_in, None if bool(mask.all()) else mask, *place)
        batch = _Batch(h_in, h_out)
        for request in requests:
            sequences, tokens = request.payload[0].shape[:2]
            rows = slice(start, start + sequences)
            start += sequences
            self._rows.setdefault(request.member, []).append(_Rows(batch, rows, tokens))
            request.answer = h_out.detach()[rows, :tokens]

    def _backward(self, requests: list[_Request]) -> None:
        if not self._reference:
            # A power of two near the step's tokens keeps gradients in range and loses no bit.
            self._reference = 2.0 ** round(math.log2(sum(r.payload[1] for r in requests)))
        batches: dict[int, _Batch] = {}
        for request in requests:
            if request.grad_BTD is None:
                batch = self._rows[request.member][0].batch
                batches[id(batch)] = batch
        for batch in batches.values():
            self._backward_batch(batch)
        for request in requests:
            request.answer = request.grad_BTD, 0.0

    def _backward_batch(self, batch: _Batch) -> None:
        """Go back once, for all that have rows in the batch, though it be the last for some."""
        waiting = [
            request
            for member, request in self._members.items()
            if request is not None and self._rows.get(member)
            and request.kind.endswith("backward")
            and request.grad_BTD is None
            and self._rows[member][0].batch is batch
        ]  # fmt: skip
        grad_out = torch.zeros_like(batch.h_out_BTD)
        for request in waiting:
            grad_BTD, tokens = request.payload
            own = self._rows[request.member][0]
            grad_out[own.rows, : own.tokens] = grad_BTD.to(grad_out) * (tokens / self._reference)
        # Who has more under way than another comes to a common batch later than it.
        served = {request.member for request in waiting}
        later = any(
            own.batch is batch
            for member, rows in self._rows.items() if member not in served
            for own in rows
        )  # fmt: skip
        torch.autograd.backward(batch.h_out_BTD, grad_out, retain_graph=later)
        grad_in = batch.h_in_BTD.grad
        if grad_in is None:
            raise TrunkError("no gradient reached the trunk's input; is this part differentiable?")
        for request in waiting:
            own, tokens = self._rows[request.member].pop(0), request.payload[1]
            self._tokens[request.member] = tokens
            request.grad_BTD = grad_in[own.rows, : own.tokens] * (self._reference / tokens)

    def _last_backward(self, requests: list[_Request]) -> None:
        self._backward(requests)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._reference / sum(self._tokens.values()))
        self._trunk_square = square = square_norm(self.parameters)
        for request in requests:
            request.answer = request.grad_BTD, square

    def _take_step(self, requests: list[_Request]) -> None:
        total = sum(request.payload[1] for request in requests)
        trunk = self._trunk_square or 0.0
        if not total:  # those who had examples in this step have left
            clients = 0.0
        elif self.ends is not None:
            clients = self.ends.set_gradients([(r.payload[1], r.payload[2]) for r in requests])
        else:
            clients = sum(r.payload[0] * r.payload[1] for r in requests) / total
        norm = math.sqrt(trunk + clients)
        if not math.isfinite(norm):
            raise TrunkError(
                f"the gradient norm of merged step {self._step} is {norm}; lower train.lr, or set "
                "train.clip",
                kind="not-finite",
            )
        member = requests[0].member
        here = Progress(
            round=member.round.number,
            rounds=member.round.rounds,
            step=min(self._step, self.steps - 1),
            steps=self.steps,
        )
        lr = learning_rate(self.train, here, trunk=True)
        if self._trunk_square is None:
            # What they left who went before the step's end was neither weighed nor clipped.
            for parameter in self.parameters:
                parameter.grad = None
        else:
            clipped_step(self.trunk_optimizer, lr=lr, norm=norm, clip=self.train.clip)
        state: dict[str, Tensor] = {}
        if self.ends is not None:
            own_lr = learning_rate(self.train, here)
            if total:
                clipped_step(self.ends.optimizer, lr=own_lr, norm=norm, clip=self.train.clip)
            state = self.ends.state()
        for request in requests:
            own_norm = norm if self.ends is not None else math.sqrt(trunk + request.payload[0])
            request.answer = own_norm, lr, state
        self._step += 1
        self._tokens.clear()
        self._reference, self._trunk_square = 0.0, None


def buckets(items: Sequence[Any], shape: Any, most: float = MAX_PADDING) -> list[list[Any]]:
    """Group micro-batches of like length, so that padding stays bounded.

    Parameters
    ----------
    items : sequence
        What is grouped.
    shape : callable
        Gives an item's (B, T).
    most : float
        Largest share of a group's B x longest T that is padding.

    Returns
    -------
    list of list
        Groups of falling length, each in the order given. Greedy: the longest starts a group, and
        ever shorter ones join while the bound holds.
    """
    found: list[list[Any]] = []
    for item in sorted(items, key=lambda item: -shape(item)[1]):
        if found:
            together = [shape(other) for other in (*found[-1], item)]
            room = sum(sequences for sequences, _ in together) * together[0][1]
            if 1 - sum(b * t for b, t in together) / room <= most:
                found[-1].append(item)
                continue
        found.append([item])
    return [sorted(group, key=items.index) for group in found]
