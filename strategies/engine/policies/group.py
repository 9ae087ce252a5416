"""Sessions that work as one: their micro-batches run through the trunk as one batch.

Every session has its own thread, as under the other policies; here they meet. A member asks for
one thing at a time (a forward, a backward, a step) and waits; when all members wait, what they ask
for is done for all at once. One that ends or dies leaves, and nobody waits for it; one whose
numbers are out of range is named and sent away. Either way the others' step goes on as if it had
never begun it: their gradient is built again without its share.

With every client present this is centralised training on the concatenated batch: gradients are
summed with the weights of the tokens, whoever has them.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from strategies.deadlines import gather
from strategies.engine.bench import Bench
from strategies.engine.checks import LARGEST
from strategies.engine.member import Member
from strategies.engine.policies.batches import Batch, Micro, Runner, buckets
from strategies.engine.policies.common_ends import CommonEnds
from strategies.engine.policies.meeting import Meeting, Request
from strategies.engine.policies.outliers import Outliers
from strategies.errors import TrunkError
from strategies.optim import Progress, clipped_step, learning_rate, square_norm

logger = logging.getLogger(__name__)

KINDS = ("forward", "backward", "last backward", "step")
"""What members ask for, in the order in which it is done."""

StepAnswer = tuple[float, float, dict[str, Tensor], dict[str, Tensor] | None]
"""Norm, learning rate, the clients' tensors after the step and, if a client has them, before."""

MOST_TIMES = 16
"""The round's schedule is at most so many times as long as what the median member announced."""


class Group:
    """The members of one round that work as one; see the module's text.

    Parameters
    ----------
    trunk : nn.Module
        What they share.
    parameters : sequence of nn.Parameter
        Those of it that are trained.
    optimizer : torch.optim.Optimizer, optional
        The trunk's; None if it is frozen.
    ends : CommonEnds, optional
        With `train.sync=step`, the clients' common tensors.
    bench : Bench
        Where it runs.
    """

    def __init__(
        self,
        trunk: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        ends: CommonEnds | None,
        bench: Bench,
    ) -> None:
        self._parameters, self._optimizer, self.ends = parameters, optimizer, ends
        # All that follows belongs to whoever does the work; others change it by `Meeting.note`.
        self._train, self._run = bench.train, Runner(trunk, bench)
        self.outliers = Outliers(bench.train.outlier_clip)
        self._meeting = Meeting(KINDS, self._do, gather(bench.timeout))
        self.padded = self.positions = 0
        self._announced: list[int] = []
        self._batches: dict[Member, list[Batch]] = {}
        """Of each member, those through which it has still to go back, in order."""
        self._has: dict[Member, int] = {}
        """The common tensors after so many steps are what a member has, from its first step on."""
        # The step that is under way.
        self._step = 0
        self._gone_back: list[Batch] = []
        self._tokens: dict[Member, int] = {}
        self._reference = 0.0
        self._torn = False
        """Whether the gradient holds a share of one who has left; it is built again before use."""
        self._trunk_square: float | None = None
        """None until the gradient of this step is whole: the last micro-batch of all is back."""

    def join(self, member: Member) -> None:
        """Take part from the next step on."""
        with self._meeting.changed:
            self._meeting.join(member)
            self._meeting.note(lambda: self._announced.append(member.steps))

    def leave(self, member: Member) -> None:
        """Take part no longer; a thread of this member that waits here learns so at once."""
        with self._meeting.changed:
            self._meeting.leave(member, TrunkError("the session has ended", kind="closed"))
            self._meeting.note(lambda: self._forget(member))

    def _forget(self, member: Member) -> None:
        self._batches.pop(member, None)
        self._torn |= self._tokens.pop(member, None) is not None

    def miss(self) -> None:
        """Expect one member less."""
        self._meeting.miss()

    def forward(
        self, member: Member, h_BTD: Tensor, mask_BT: Tensor | None, *, wanted: bool
    ) -> Tensor:
        """The trunk's output (B, T, D) for this member's micro-batch."""
        micro = Micro(member=member, h_BTD=h_BTD, mask_BT=mask_BT, wanted=wanted)
        answer: Tensor = self._meeting.ask(Request(member, "forward", (micro,)))
        return answer

    def backward(
        self, member: Member, grad_BTD: Tensor | None, tokens: int, *, last: bool
    ) -> tuple[Tensor | None, float]:
        """Go back through the member's micro-batch.

        Returns
        -------
        grad_BTD : Tensor or None
            dL/dh1 (B, T, D) of the member's own mean loss over its step's `tokens` tokens, if it
            is wanted.
        square_norm : float
            If `last`, squared norm of the common trunk's gradient, for which all have come to
            their last micro-batch; else 0.
        """
        kind = "last backward" if last else "backward"
        answer: tuple[Tensor | None, float] = self._meeting.ask(
            Request(member, kind, (grad_BTD, tokens))
        )
        return answer

    def step(
        self, member: Member, square: float, tokens: int, gradients: Mapping[str, Tensor]
    ) -> StepAnswer:
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
        since : dict[str, Tensor], optional
            Those before it, if this client has them.
        """
        answer: StepAnswer = self._meeting.ask(Request(member, "step", (square, tokens, gradients)))
        return answer

    def _do(self, kind: str, requests: list[Request]) -> None:
        """Do what the first kind of request asks for all who ask it; the others go on waiting."""
        works = {
            "forward": self._forward,
            "backward": self._backward,
            "last backward": self._last_backward,
            "step": self._take_step,
        }
        works[kind](requests)

    def _send_away(self, member: Member, error: TrunkError) -> None:
        """Give one member's request this error; it takes part no longer."""
        logger.warning("merged: client %s is left out: %s", member.client, error)
        self._meeting.leave(member, error)
        self._batches.pop(member, None)
        self._tokens.pop(member, None)

    def _forward(self, requests: list[Request]) -> None:
        micros = [request.payload[0] for request in requests]
        answers: dict[Member, Tensor] = {}
        for bucket in buckets(micros, lambda micro: micro.shape):
            answers |= self._forward_bucket(bucket)
        for request in requests:
            request.answer = answers.get(request.member)

    def _forward_bucket(self, micros: list[Micro]) -> dict[Member, Tensor]:
        batch = Batch(micros, self._step, self._run)
        odd = batch.odd()
        if not odd:
            self.padded += batch.padded
            self.positions += batch.positions
            for micro in micros:
                self._batches.setdefault(micro.member, []).append(batch)
            return {micro.member: batch.output(micro.member) for micro in micros}
        if len(micros) == 1:
            self._send_away(micros[0].member, self._overflow("activations make the trunk's output"))
            return {}
        # As if they had never come; alone, each shows whether it is at fault.
        rest = [micro for micro in micros if micro.member not in odd]
        answers = self._forward_bucket(rest) if rest else {}
        for micro in micros:
            if micro.member in odd:
                answers |= self._forward_bucket([micro])
        return answers

    def _backward(self, requests: list[Request]) -> None:
        if not self._reference:
            # A power of two near the step's tokens keeps gradients in range and loses no bit.
            self._reference = 2.0 ** round(math.log2(sum(r.payload[1] for r in requests)))
        self.outliers.cut_backwards(self._step, self._meeting.waiting.values())
        for request in requests:
            if not request.gone_back:
                self._backward_batch(self._batches[request.member][0])
        for request in requests:
            request.answer = request.grad_BTD, 0.0

    def _backward_batch(self, batch: Batch) -> None:
        """Go back once, for all that have rows in the batch, though it be the last for some."""
        waiting = {
            member: request
            for member, request in self._meeting.waiting.items()
            if self._batches.get(member)
            and request.kind.endswith("backward")
            and not request.gone_back
            and self._batches[member][0] is batch
        }  # fmt: skip
        # Who has more under way than another comes to a common batch later than it.
        later = any(
            member not in waiting and batch in batches for member, batches in self._batches.items()
        )
        weighed = {
            member: request.payload[0] * (request.payload[1] / self._reference)
            for member, request in waiting.items()
            if request.payload[0] is not None
        }
        answers = batch.backward(weighed, later=later)
        self._gone_back.append(batch)
        for member, request in waiting.items():
            self._batches[member].pop(0)
            tokens = self._tokens[member] = request.payload[1]
            request.gone_back = True
            if (grad_BTD := answers.get(member)) is not None:
                request.grad_BTD = grad_BTD * (self._reference / tokens)

    def _last_backward(self, requests: list[Request]) -> None:
        self._backward(requests)
        square = self._again(self._tokens.keys()) if self._torn else self._normed()
        if not square <= LARGEST**2:
            square = self._without_the_overflowing()
        self._trunk_square = square
        for request in requests:
            request.answer = request.grad_BTD, square

    def _normed(self) -> float:
        """Make the sum of weighed gradients their mean; returns its squared norm."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if gradients and self._tokens:
            torch._foreach_mul_(gradients, self._reference / sum(self._tokens.values()))
        return square_norm(self._parameters)

    def _without_the_overflowing(self) -> float:
        """Send those away whose share alone is too large, and build the gradient of the others."""
        culprits = [member for member in self._tokens if not self._again([member]) <= LARGEST**2]
        for member in culprits:
            self._send_away(member, self._overflow("share of the trunk's gradient is"))
        return self._again(self._tokens.keys())

    def _again(self, members: Collection[Member]) -> float:
        """The trunk's gradients of this step from these members alone; returns the squared norm."""
        self._clear_gradients()
        self._torn = False
        for batch in dict.fromkeys(self._gone_back):
            batch.backward_again(members)
        return self._normed()

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _overflow(self, what: str) -> TrunkError:
        return TrunkError(
            f"this client's {what} too large for the merged step {self._step}: beyond "
            f"{LARGEST:.3g}, or not finite; lower train.lr, or set train.clip",
            kind="not-finite",
        )

    def _take_step(self, requests: list[Request]) -> None:
        if self._torn and self._trunk_square is not None:
            self._trunk_square = self._again(self._tokens.keys()) if self._tokens else None
        total = sum(request.payload[1] for request in requests)
        trunk = self._trunk_square or 0.0
        clients = self._clients_square(requests, total) if total else 0.0
        norm = math.sqrt(trunk + clients)
        if not math.isfinite(norm):
            raise TrunkError(
                f"the gradient norm of merged step {self._step} is {norm}; lower train.lr, or set "
                "train.clip",
                kind="not-finite",
            )
        here = self._progress(requests[0].member)
        lr = learning_rate(self._train, here, trunk=True)
        if self._trunk_square is None:
            # What they left who went before the step's end was neither weighed nor clipped.
            self._clear_gradients()
        else:
            clipped_step(self._optimizer, lr=lr, norm=norm, clip=self._train.clip)
        state: dict[str, Tensor] = {}
        before: dict[str, Tensor] = {}
        if self.ends is not None:
            before = {name: tensor.clone() for name, tensor in self.ends.state().items()}
            if total:  # else those who had examples in this step have left
                own_lr = learning_rate(self._train, here)
                clipped_step(self.ends.optimizer, lr=own_lr, norm=norm, clip=self._train.clip)
            state = self.ends.state()
        for request in requests:
            own_norm = norm if self.ends is not None else math.sqrt(trunk + request.payload[0])
            # Who came in mid-round has what the round began with.
            has = self._has.get(request.member, 0) == self._step
            self._has[request.member] = self._step + 1
            request.answer = own_norm, lr, state, before if has else None
        self._next_step()

    def _clients_square(self, requests: list[Request], total: int) -> float:
        """Squared norm of the clients' common gradient, or the mean of those of their own."""
        told = self.outliers.cut_steps(self._step, requests)
        if self.ends is not None:
            return self.ends.set_gradients([(tokens, own) for _, tokens, own in told])
        return float(sum(square * tokens for square, tokens, _ in told) / total)

    def _progress(self, member: Member) -> Progress:
        """Where this step lies. No single announcement stretches the schedule for everybody."""
        usual = statistics.median_low(self._announced)
        steps = min(max(self._announced), MOST_TIMES * usual)
        round = member.round
        return Progress(
            round=round.number, rounds=round.rounds, step=min(self._step, steps - 1), steps=steps
        )

    def _next_step(self) -> None:
        self._step += 1
        self._gone_back.clear()
        self._tokens.clear()
        self._reference, self._torn, self._trunk_square = 0.0, False, None
