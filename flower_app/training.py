"""A client's side of training and evaluation, free of Flower and of any transport.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import TrainConfig
from flower_app.data import Batch
from flower_app.text import IGNORED
from models import load_client_state, named_trainable
from strategies.optim import (
    Progress,
    add_proximal,
    autocast,
    build_optimizer,
    clipped_step,
    derive_seed,
    learning_rate,
    square_norm,
    trainable,
)
from strategies.transport.link import Link, StepCounters


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in the run a client is: what its randomness and its schedule depend on."""

    seed: int
    client: str
    round: int
    rounds: int


@dataclass(kw_only=True)
class Outcome:
    """What one session amounted to. `loss` is the mean over `tokens` tokens, in nats."""

    loss: float
    tokens: int
    steps: int = 0
    losses: list[float] = field(default_factory=list)


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, int]:
    """Summed cross-entropy of next-token prediction.

    Parameters
    ----------
    logits_BTV : Tensor
        Floating point; position t predicts the label at t + 1.
    labels_BT : Tensor
        int64, not shifted; `IGNORED` where a token does not count (padding, prompts).

    Returns
    -------
    total : Tensor
        Scalar fp32 sum over the labels that count, in nats.
    tokens : int
        How many labels count.
    """
    targets = labels_BT[:, 1:].reshape(-1)
    logits = logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return total, int((targets != IGNORED).sum())


def train(
    bottom: nn.Module,
    top: nn.Module,
    link: Link,
    steps: Iterable[Sequence[Batch]],
    count: int,
    config: TrainConfig,
    place: Place,
) -> Outcome:
    """Train bottom and top for one round, the trunk at the other end of the link with them.

    Each optimizer step minimises the mean loss over all tokens of its micro-batches, so that
    `accumulate=2` equals one batch of twice the size.

    Parameters
    ----------
    bottom, top : nn.Module
        Callable as the parts of `models.split`; their trainable parameters move in place.
    link : Link
        The open session.
    steps : iterable of sequences of Batch
        The micro-batches of each optimizer step.
    count : int
        How many steps there are, for the schedule.
    config : TrainConfig
        Optimizer, schedule, clipping, precision.
    place : Place
        Seeds of dropout, and the round.

    Raises
    ------
    TrunkError
        When the trunk refuses, fails or falls silent.
    ValueError
        If a step has no token that counts.
    """
    trainer = Trainer(bottom, top, link, count, config, place)
    outcome = Outcome(loss=0.0, tokens=0)
    for step, batches in enumerate(steps):
        loss, tokens = trainer.step(step, batches)
        outcome.losses.append(loss)
        outcome.loss += loss * tokens
        outcome.tokens += tokens
        outcome.steps += 1
    outcome.loss /= max(1, outcome.tokens)
    return outcome


@torch.no_grad()
def evaluate(
    bottom: nn.Module, top: nn.Module, link: Link, batches: Iterable[Batch], config: TrainConfig
) -> Outcome:
    """Mean loss per token over held-out batches, through a forward-only session.

    Raises
    ------
    ValueError
        If no token counts, or a loss is not finite.
    """
    bottom.eval()
    top.eval()
    total, tokens = 0.0, 0
    for position, batch in enumerate(batches):
        device = next(bottom.parameters()).device
        ids, mask, labels = _on(device, batch)
        with autocast(device, config.precision):
            h2_BTD = link.compute(position, 0, bottom(ids, mask), mask)
            loss, count = token_loss(top(h2_BTD, mask), labels)
        if not torch.isfinite(loss):
            raise ValueError(f"held-out batch {position} has a loss of {float(loss)}")
        total, tokens = total + float(loss), tokens + count
    if tokens == 0:
        raise ValueError(
            "no held-out token to evaluate on; raise data.heldout or data.max_examples"
        )
    return Outcome(loss=total / tokens, tokens=tokens)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers from `seed`, and leave the process's generator as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Trainer:
    """One client's optimizer steps in one round; see `train` for the parameters."""

    def __init__(
        self,
        bottom: nn.Module,
        top: nn.Module,
        link: Link,
        count: int,
        config: TrainConfig,
        place: Place,
    ) -> None:
        self._bottom, self._top, self._link = bottom.train(), top.train(), link
        self._count, self._config, self._place = count, config, place
        self._device = next(itertools.chain(bottom.parameters(), top.parameters())).device
        self._parameters = trainable(bottom, top)
        self._optimizer = build_optimizer(self._parameters, config)
        self._anchor = [p.detach().clone() for p in self._parameters] if config.prox else []
        self._seconds: dict[str, float] = {}
        self._trunk_square = 0.0

    def step(self, step: int, batches: Sequence[Batch]) -> tuple[float, int]:
        """Take one optimizer step in all three parts; returns its mean loss and its tokens."""
        self._seconds = dict.fromkeys(("bottom", "network", "top"), 0.0)
        trunk_before = self._link.trunk_seconds
        tokens = sum(batch.tokens for batch in batches)
        if tokens == 0 and batches:
            raise ValueError(f"step {step} has no token that counts; is everything a prompt?")
        total = 0.0
        for micro, batch in enumerate(batches):
            total += self._micro_batch(step, micro, batch, tokens, micro == len(batches) - 1)
        if self._anchor and batches:
            add_proximal(self._parameters, self._anchor, self._config.prox)
        client_square = square_norm(self._parameters)
        # What the trunk used of the waiting is its own time, not the network's.
        network = self._seconds["network"] - (self._link.trunk_seconds - trunk_before)
        counters = StepCounters(
            client_square_norm=client_square,
            tokens=tokens,
            loss=total / max(1, tokens),
            seconds_bottom=self._seconds["bottom"],
            seconds_network=max(0.0, network),
            seconds_top=self._seconds["top"],
        )
        self._step_together(step, counters)
        return total / max(1, tokens), tokens

    def _step_together(self, step: int, counters: StepCounters) -> None:
        """Take the optimizer step on both sides, clipped by the norm over all parts."""
        if self._config.sync == "step":
            self._link.apply(step, counters, self._gradients(counters.tokens))
            load_client_state(self._bottom, self._top, self._link.applied().state)  # type: ignore[arg-type]
            for parameter in self._parameters:
                parameter.grad = None
            return
        self._link.apply(step, counters)  # the trunk steps while this client does
        norm = math.sqrt(self._trunk_square + counters.client_square_norm)
        merged = self._config.strategy == "merged"
        if merged or not math.isfinite(norm):
            # Only the trunk knows the norm of a merged step; of a bad one it says what it found.
            norm = self._link.applied().grad_norm
        place = self._place
        progress = Progress(round=place.round, rounds=place.rounds, step=step, steps=self._count)
        rate = learning_rate(self._config, progress)
        clipped_step(self._optimizer, lr=rate, norm=norm, clip=self._config.clip)
        if not merged:
            self._link.applied()

    def _gradients(self, tokens: int) -> dict[str, Tensor]:
        if not tokens:
            return {}
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in named_trainable(self._bottom, self._top).items()
        }

    def _micro_batch(self, step: int, micro: int, batch: Batch, tokens: int, last: bool) -> float:
        ids, mask, labels = _on(self._device, batch)
        place = self._place
        seed = derive_seed(place.seed, place.round, place.client, step, micro, "client")
        with seeded(seed, self._device):
            with self._clock("bottom"), autocast(self._device, self._config.precision):
                h1_BTD = self._bottom(ids, mask)
            with self._clock("network"):
                h2_BTD = self._link.compute(step, micro, h1_BTD.detach(), mask)
            h2_BTD = h2_BTD.detach().requires_grad_()
            with self._clock("top"):
                with autocast(self._device, self._config.precision):
                    loss, _ = token_loss(self._top(h2_BTD, mask), labels)
                (loss / tokens).backward()
        if h2_BTD.grad is None:
            raise RuntimeError("no gradient reached the top's input; is the top differentiable?")
        with self._clock("network"):
            grad_BTD, self._trunk_square = self._link.backward(
                step, micro, h2_BTD.grad, last=last, tokens=tokens
            )
        with self._clock("bottom"):
            if h1_BTD.requires_grad:
                h1_BTD.backward(grad_BTD.to(h1_BTD.dtype))
        return float(loss.detach())

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - started


def _on(device: torch.device, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move a batch; a mask without padding is left out, as everywhere in Graft."""
    mask = None if bool(batch.attention_mask.all()) else batch.attention_mask.to(device)
    return batch.input_ids.to(device), mask, batch.labels.to(device)
