"""The client's own share of a training step: bottom and top, their gradients and their optimizer.

`step` puts them together, with what goes to the trunk and comes back.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import TrainConfig
from flower_app.client.defences.defence import defence_of, say_place
from flower_app.client.place import Place
from flower_app.client.remembered import check_same, names_of
from flower_app.data.client import Batch
from flower_app.data.text import IGNORED
from models import client_state, load_client_state, named_trainable
from models.bridge import Regression
from strategies.engine.checks import has_dropout
from strategies.optim import (
    ALONE,
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


class Clock:
    """Seconds that a step spends in each end."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self.seconds = dict.fromkeys(("bottom", "top"), 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


class Ends:
    """Bottom and top of one client during one round.

    Parameters
    ----------
    bottom, top : nn.Module
        Callable as the parts of `models.split`; their trainable parameters move in place.
    count : int
        Optimizer steps in this round, for the schedule.
    config : TrainConfig
        Optimizer, schedule, clipping, precision.
    place : Place
        Seeds of dropout, and the round.
    bridge : Regression, optional
        Learns beside them, and changes nothing of theirs.
    """

    def __init__(
        self,
        bottom: nn.Module,
        top: nn.Module,
        count: int,
        config: TrainConfig,
        place: Place,
        bridge: Regression | None = None,
    ) -> None:
        self.bridge = bridge
        self._bottom, self._top = bottom.train(), top.train()
        self._count, self.config, self._place = count, config, place
        self._device = next(itertools.chain(bottom.parameters(), top.parameters())).device
        self._draws = has_dropout(bottom) or has_dropout(top)
        self._parameters = trainable(bottom, top)
        self.bottom_learns = bool(trainable(bottom))
        """Whether dL/dh1 is of any use."""
        both = set(map(id, bottom.parameters())) & set(map(id, top.parameters()))
        self._tied = [p for p in self._parameters if id(p) in both]
        self._tied_below: list[Tensor | None] = [None] * len(self._tied)
        if place.secret:
            check_same(bottom)
        self._optimizer = build_optimizer(self._parameters, config)
        self._anchor = [p.detach().clone() for p in self._parameters] if config.prox else []
        self.clock = Clock()

    def count_tokens(self, step: int, batches: Sequence[Batch]) -> int:
        """Tokens that count in a step; 0 only for a step without examples."""
        tokens = sum(batch.tokens for batch in batches)
        if tokens == 0 and batches:
            raise ValueError(f"step {step} has no token that counts; is everything a prompt?")
        return tokens

    def mask(self, batch: Batch) -> Tensor | None:
        """The batch's mask on the device; None without padding."""
        return on_device(self._device, batch)[1]

    def names(self, batch: Batch) -> list[bytes]:
        """Names of the batch's examples with `link.cache_mb`, else none."""
        return names_of(self._place.secret, batch) if self._place.secret else []

    def up(self, step: int, micro: int, batch: Batch) -> Tensor:
        """The bottom's output h1 (B, T, D), with its graph; the same in every call."""
        ids, mask, _ = on_device(self._device, batch)
        say_place(self._bottom, "train", self._place.round, step, micro)
        with self._seeded(step, micro, "bottom"), self.clock("bottom"), self._autocast():
            h1_BTD: Tensor = self._bottom(ids, mask)
        return h1_BTD

    def across(
        self, step: int, micro: int, batch: Batch, h2_BTD: Tensor, tokens: int
    ) -> tuple[float, Tensor]:
        """Top, loss, and back to the cut; the top's gradients add up.

        Parameters
        ----------
        h2_BTD : Tensor
            The trunk's output.
        tokens : int
            Tokens that count in the whole step.

        Returns
        -------
        loss : float
            Summed over the micro-batch's tokens, in nats.
        grad_BTD : Tensor
            Gradient of the step's mean loss with respect to h2.
        """
        _, mask, labels = on_device(self._device, batch)
        h2_BTD = h2_BTD.detach().to(self._device).requires_grad_()
        say_place(self._top, "train", self._place.round, step, micro)
        with self._seeded(step, micro, "top"), self.clock("top"):
            with self._autocast():
                loss, _ = token_loss(self._top(h2_BTD, mask), labels)
            (loss / tokens).backward()
        if h2_BTD.grad is None:
            raise RuntimeError("no gradient reached the top's input; is the top differentiable?")
        return float(loss.detach()), h2_BTD.grad

    def down(self, h1_BTD: Tensor, grad_BTD: Tensor, batch: Batch, tokens: int) -> None:
        """Go back through the bottom, with what a defence adds to the loss; gradients add up.

        Of the `tokens` that count in the step, the batch's penalty has a share as its loss has.
        """
        if not h1_BTD.requires_grad:
            return
        with self.clock("bottom"), self._apart():
            roots, grads = [h1_BTD], [grad_BTD.to(h1_BTD.device, h1_BTD.dtype)]
            if (defence := defence_of(self._bottom)) is not None:
                ids, mask, _ = on_device(self._device, batch)
                if (penalty := defence.penalty(h1_BTD, ids, mask)) is not None:
                    roots.append(penalty)
                    grads.append(torch.full_like(penalty, batch.tokens / tokens))
            torch.autograd.backward(roots, grads)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Add the bottom's gradients of what it shares with the top up by themselves: the sum must
        not depend on how many tops go before a bottom."""
        tops = [parameter.grad for parameter in self._tied]
        for parameter, grad in zip(self._tied, self._tied_below, strict=True):
            parameter.grad = grad
        yield
        self._tied_below = [parameter.grad for parameter in self._tied]
        for parameter, grad in zip(self._tied, tops, strict=True):
            parameter.grad = grad

    def _joined(self) -> None:
        """Put what both ends have found of what they share together."""
        for parameter, grad in zip(self._tied, self._tied_below, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        self._tied_below = [None] * len(self._tied)

    def teach_bridge(
        self, step: int, micro: int, batch: Batch, h1_BTD: Tensor | None, h2_BTD: Tensor
    ) -> None:
        """Let the bridge, if there is one, learn from what crossed the cut."""
        if self.bridge is None:
            return
        if h1_BTD is None:  # its graph was dropped; it is the same again
            with torch.no_grad():
                h1_BTD = self.up(step, micro, batch)
        with self.clock("top"):
            self.bridge.learn(h1_BTD, h2_BTD.to(self._device), self.mask(batch))

    def square_norm(self) -> float:
        """Squared norm of the gradients of both ends, complete for this step; FedProx included."""
        self._joined()
        if self._anchor:
            add_proximal(self._parameters, self._anchor, self.config.prox)
        return square_norm(self._parameters)

    def take_step(self, step: int, square: float) -> None:
        """Step the ends' optimizer, clipped by the norm over all parts, whose square is given."""
        place = self._place
        progress = Progress(round=place.round, rounds=place.rounds, step=step, steps=self._count)
        rate = learning_rate(self.config, progress)
        clipped_step(self._optimizer, lr=rate, norm=math.sqrt(square), clip=self.config.clip)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients by global name, zero where none came."""
        return {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in named_trainable(self._bottom, self._top).items()  # type: ignore[arg-type]
        }

    def load(self, changed: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        """Take over what changed of the common tensors, and forget the gradients that led to it.

        Parameters
        ----------
        changed : mapping
            Tensors by name in the whole model; those that are missing stay.
        rows : mapping
            Which rows of it a tensor is (int64); those without are whole.

        Raises
        ------
        ValueError
            For a name, a shape or a row that the ends do not have.
        """
        own = client_state(self._bottom, self._top)  # type: ignore[arg-type]
        whole = {**own, **changed}
        for name, numbers in rows.items():
            known, came = own.get(name, torch.zeros(())), changed[name]
            wanted = (len(numbers), *known.shape[1:])  # one row would be taken for each of many
            if not known.dim() or numbers.max() >= len(known) or came.shape != wanted:
                raise ValueError(
                    f"the server sends {len(numbers)} rows of '{name}' {tuple(came.shape)} that "
                    "the ends have not"
                )
            whole[name] = known.clone()
            whole[name][numbers.to(known.device)] = came.to(known)
        load_client_state(self._bottom, self._top, whole)  # type: ignore[arg-type]
        self.set_gradients({})

    def set_gradients(self, gradients: Mapping[int, Tensor]) -> None:
        """Set gradients by the parameter's position; None where there is none."""
        for index, parameter in enumerate(self._parameters):
            own = gradients.get(index)
            parameter.grad = None if own is None else own.to(parameter)

    def kept_gradients(self) -> dict[int, Tensor]:
        """What `set_gradients` takes."""
        return {i: p.grad for i, p in enumerate(self._parameters) if p.grad is not None}

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's moments by the parameter's position."""
        return dict(self._optimizer.state_dict()["state"]) if self._optimizer else {}

    def load_optimizer_state(self, state: Mapping[int, Mapping[str, Any]]) -> None:
        """Go on with an optimizer's moments."""
        if self._optimizer is not None:
            whole = self._optimizer.state_dict()
            self._optimizer.load_state_dict({**whole, "state": dict(state)})

    @contextmanager
    def _seeded(self, step: int, micro: int, part: str) -> Iterator[None]:
        """Draw dropout from the place in the run, and leave the process's generator as it was.

        Only then do clients of one process, of which torch has one generator, go one by one.
        """
        if not self._draws:
            yield
            return
        place, device = self._place, self._device
        with ALONE, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(place.seed, place.round, place.client, step, micro, part))
            yield

    def _autocast(self) -> Any:
        return autocast(self._device, self.config.precision)


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


def on_device(device: torch.device, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move a batch; a mask without padding is left out, as everywhere in Graft."""
    mask = None if bool(batch.attention_mask.all()) else batch.attention_mask.to(device)
    return batch.input_ids.to(device), mask, batch.labels.to(device)
