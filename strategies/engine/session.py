"""One client's work on the trunk during a round: forwards, backwards and steps, in order and once.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from strategies.engine.bench import Bench
from strategies.engine.checks import check_bounded, check_square
from strategies.engine.lane import Lane, StepResult
from strategies.engine.meter import Meter
from strategies.errors import TrunkError


class Session:
    """One client's forwards, backwards and steps during one round. Opened by `TrunkEngine.open`.

    What comes again is refused: whoever sends frames keeps the replies, and sends those again
    (`Conversation`).
    """

    def __init__(self, lane: Lane, bench: Bench) -> None:
        self._lane, self._bench, self.hidden_size = lane, bench, bench.hidden_size
        self.member = member = lane.member
        self.client, self.steps, self.round = member.client, member.steps, member.round
        self.applied = 0
        self.tokens = 0
        self.moves = 0
        """Grows with everything that a frame moves."""
        self._pending: dict[int, tuple[int, ...]] = {}
        self._unwanted: set[int] = set()
        self._gone_back: set[int] = set()
        self._ready = False
        self._learnable = 0
        self._evaluated: dict[tuple[int, int], int] = {}
        self._held_bytes = self._kept_bytes = 0
        self._closed = False
        # The round may end (in Flower's thread) while this session works (in its stream's thread).
        self._busy = threading.Lock()

    def compute(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, *, wanted: bool = True
    ) -> Tensor:
        """Run the trunk forward on one micro-batch.

        Parameters
        ----------
        step, micro : int
            The optimizer step, from 0, and the micro-batch within it, from 0. In evaluation any.
        h_BTD : Tensor
            The bottom's output, floating point.
        mask_BT : Tensor or None
            1 where there is a token, 0 where there is padding; None if nothing is padded.
        wanted : bool
            False if the bottom learns nothing: `backward` returns no gradient then.

        Returns
        -------
        Tensor
            The trunk's output, (B, T, D), without a graph; training keeps the graph here.

        Raises
        ------
        TrunkError
            A wrong shape, a step out of order, too much in flight, a closed session.
        """
        self.check_open()
        self.check_shapes(tuple(h_BTD.shape), None if mask_BT is None else tuple(mask_BT.shape))
        if not h_BTD.is_floating_point():
            raise TrunkError(f"activations must be floating point, got {h_BTD.dtype}", kind="shape")
        check_bounded(h_BTD, f"the tensor of activations of step {step}")
        h_BTD = h_BTD.to(self._bench.device)
        mask_BT = None if mask_BT is None else mask_BT.to(self._bench.device)
        if not self.round.training:
            self._evaluated[step, micro] = held_tokens(h_BTD, mask_BT)
            self.tokens = sum(self._evaluated.values())
            with self._bench.meter.work("forward", self._evaluated[step, micro]):
                return self._lane.forward(step, micro, h_BTD, mask_BT)
        self._check_step(step)
        self._lane.begin()
        with self._working():
            self.check_fresh(step, micro)
            self._check_compute(step, micro)
            self._bench.in_flight.take(h_BTD.nbytes)
            self._held_bytes += h_BTD.nbytes
            tokens = held_tokens(h_BTD, mask_BT)
            with self._bench.meter.work("forward", tokens):
                h_out_BTD = self._lane.forward(step, micro, h_BTD, mask_BT, wanted=wanted)
            if not wanted:
                self._unwanted.add(micro)
            self._pending[micro] = tuple(h_BTD.shape)
            # No step can learn from more tokens than it holds: a client's weight is its tokens.
            self._learnable += tokens
            self.moves += 1
            return h_out_BTD

    def check_fresh(self, step: int, micro: int, *, back: bool = False) -> None:
        """Refuse what came before: its codec has decoded it once, and must not twice."""
        if not self.round.training:
            return
        if step < self.applied:
            raise TrunkError(
                f"step {step} came again, step {self.applied} is the current one", kind="order"
            )
        if micro in self._gone_back or (micro in self._pending and not back):
            raise TrunkError(f"step {step}, micro-batch {micro} came before", kind="order")

    def _check_compute(self, step: int, micro: int) -> None:
        if micro >= (most := self._bench.max_micro_batches):
            raise TrunkError(
                f"micro-batch {micro} came; train.accumulate="
                f"{self._bench.train.accumulate} allows 0 to {most - 1}",
                kind="order",
            )
        if len(self._pending) >= self._bench.max_graphs:
            raise TrunkError(
                f"{len(self._pending)} micro-batches already wait for their backward; "
                f"at most {self._bench.max_graphs} may"
            )
        if self._ready:
            raise TrunkError(f"step {step} had its last micro-batch: apply it", kind="order")

    def learns(self, micro: int) -> bool:
        """Whether anything, trunk or bottom, learns from a micro-batch that was computed; if not,
        its `backward` needs no gradient."""
        return bool(self._lane.parameters) or micro not in self._unwanted

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor | None, *, last: bool, tokens: int = 0
    ) -> tuple[Tensor | None, float]:
        """Run the trunk backward on one micro-batch; its gradients add up until `apply`.

        Parameters
        ----------
        step, micro : int
            As given to `compute`.
        grad_BTD : Tensor or None
            Gradient of the loss with respect to the trunk's output; None only where nothing
            `learns` from it.
        last : bool
            True for the last micro-batch of the step.
        tokens : int
            Tokens that count in the step's loss, all micro-batches together: what the gradient
            weighs among those of other clients under `merged`.

        Returns
        -------
        grad_BTD : Tensor or None
            Gradient of the loss with respect to the trunk's input, if it is wanted.
        square_norm : float
            Squared norm of the trunk's accumulated gradient if `last`, else 0. Under `merged` it is
            the gradient of the whole cohort's loss.
        """
        with self._working():
            self._check_backward(step, micro, grad_BTD, last)
            with self._bench.meter.work("backward"):
                answer = self._lane.backward(step, micro, grad_BTD, last=last, tokens=tokens)
            del self._pending[micro]
            self._gone_back.add(micro)
            self._ready = last
            self.moves += 1
            return answer

    def check_due(self, step: int, micro: int, shape: tuple[int, ...] | None) -> None:
        """Refuse a gradient, before it is read, that is not of a forward which waits for it.

        `shape` is None where none came.
        """
        if not self.round.training:
            raise TrunkError("this session evaluates: it has no backward", kind="order")
        self.check_fresh(step, micro, back=True)
        self._check_step(step)
        if micro not in self._pending:
            raise TrunkError(
                f"step {step}, micro-batch {micro} has no forward to go back through", kind="order"
            )
        if shape is None:
            if self.learns(micro):
                raise TrunkError(
                    f"step {step}, micro-batch {micro} goes back without a gradient; trunk or "
                    "bottom learns from it",
                    kind="shape",
                )
        elif shape != self._pending[micro]:
            raise TrunkError(
                f"gradient has shape {shape}, its activations had {self._pending[micro]}",
                kind="shape",
            )

    def _check_backward(self, step: int, micro: int, grad_BTD: Tensor | None, last: bool) -> None:
        self.check_due(step, micro, None if grad_BTD is None else tuple(grad_BTD.shape))
        if grad_BTD is not None:
            check_bounded(grad_BTD, f"the gradient of step {step}")
        if last and (others := sorted(self._pending.keys() - {micro})):
            raise TrunkError(
                f"step {step}: micro-batches {others} still wait for their backward, so this one "
                "is not the last",
                kind="order",
            )

    def apply(
        self,
        step: int,
        *,
        client_square_norm: float,
        tokens: int,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> StepResult:
        """Clip by the norm over all parts and take the optimizer step.

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
            self._check_apply(step, client_square_norm, tokens)
            with self._bench.meter.work("step"):
                result = self._lane.step(step, client_square_norm, tokens, gradients or {})
            self._finish_step()
            self.applied += 1
            self.tokens += tokens
            self.moves += 1
            return result

    def _check_apply(self, step: int, client_square_norm: float, tokens: int) -> None:
        self._check_step(step)
        check_square(step, client_square_norm)
        if self._lane.takes_empty_steps and tokens == 0 and not self._learnable:
            return
        if not self._ready:
            raise TrunkError(f"step {step} has not had its last backward", kind="order")
        if not 0 < tokens <= self._learnable:
            raise TrunkError(
                f"step {step} reports {tokens} tokens; its micro-batches held {self._learnable}"
            )

    @property
    def codec_seed(self) -> int:
        """What its codecs draw from."""
        return self._bench.codec_seed(self.client, self.round)

    @property
    def closed(self) -> bool:
        """Whether it does no more."""
        return self._closed

    @property
    def meter(self) -> Meter:
        """Told of the trunk's work."""
        return self._bench.meter

    @property
    def most_under_way(self) -> int:
        """Micro-batches that may wait for their backward."""
        return self._bench.max_graphs

    def hold(self, count: int) -> None:
        """Count bytes that are kept for this session until they are released, or it closes."""
        with self._working():
            self._bench.in_flight.take(count)
            self._kept_bytes += count

    def release(self, count: int) -> None:
        """Count bytes less that were kept, if they still are."""
        with self._busy:
            count = min(count, self._kept_bytes)
            self._kept_bytes -= count
            self._bench.in_flight.give_back(count)

    def leave(self) -> None:
        """Say at once that this session does no more, though its thread may still be at work."""
        self._closed = True
        self._lane.leave()

    def close(self) -> None:
        """Drop what is in flight. What was trained waits for the end of the round. A second call
        does nothing."""
        self.leave()
        with self._busy:
            self._lane.close()
            self._finish_step()
            self._bench.in_flight.give_back(self._kept_bytes)
            self._kept_bytes = 0

    def _finish_step(self) -> None:
        self._lane.drop()
        self._pending.clear()
        self._unwanted.clear()
        self._gone_back.clear()
        self._ready, self._learnable = False, 0
        self._bench.in_flight.give_back(self._held_bytes)
        self._held_bytes = 0

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._busy:
            if self._closed:  # perhaps while this thread waited for what it now holds
                self._lane.drop()
            self.check_open()
            yield

    def check_open(self) -> None:
        """`TrunkError` once this session does no more."""
        if self._closed:
            raise TrunkError("the session is closed: its round has ended", kind="closed")

    def _check_step(self, step: int) -> None:
        if step < self.applied:
            raise TrunkError(
                f"step {step} came again, step {self.applied} is the current one", kind="order"
            )
        if step != self.applied:
            raise TrunkError(f"step {step} came, step {self.applied} was due", kind="order")
        if step >= self.steps:
            raise TrunkError(f"step {step} exceeds the {self.steps} announced", kind="order")

    def check_shapes(self, shape: tuple[int, ...], mask_shape: tuple[int, ...] | None) -> None:
        """Refuse a shape before anything is made of it: activations (B, T, D) and mask (B, T)."""
        self._bench.check_shapes(shape, mask_shape)

    @property
    def ends(self) -> Mapping[str, Tensor]:
        """The clients' common tensors as they are now, where a step of this session moves them."""
        return self._lane.ends


def held_tokens(h_BTD: Tensor, mask_BT: Tensor | None) -> int:
    """Tokens of a micro-batch: those that are not padding."""
    return h_BTD.shape[0] * h_BTD.shape[1] if mask_BT is None else int(mask_BT.sum())
