"""One optimizer step of each side, the real one, whatever its tensors are made of.

A meter (operations counted, seconds) is read where a phase ends.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conf.schema import TrainConfig
from flower_app.client.ends import token_loss
from flower_app.client.place import Place
from flower_app.client.streamed import Trainer
from flower_app.data.client import Batch
from models import Part
from strategies.engine.engine import TrunkEngine
from strategies.engine.lane import StepResult
from strategies.engine.session import Session
from strategies.optim import autocast, build_optimizer, clipped_step, square_norm, trainable
from strategies.transport.link import OfBack, OfCompute, StepCounters

STEPS = 2**20
"""Announced; more than are ever rehearsed."""

Meter = Callable[[], float]

OPTIMIZER = ("client step", "trunk step", "step")
"""The phases in which moments are made, if there are none yet."""


class Phases:
    """What a meter counted in each phase of a step.

    Parameters
    ----------
    meter : callable
        Grows while work is done.
    ended : callable
        Told of each phase that ends.
    """

    def __init__(self, meter: Meter, ended: Callable[[str], None] = lambda name: None) -> None:
        self._meter, self._ended, self._last = meter, ended, meter()
        self.spent: dict[str, float] = {}

    def end(self, name: str) -> None:
        """Say what was done since the last call."""
        now = self._meter()
        self.spent[name] = self.spent.get(name, 0.0) + now - self._last
        self._ended(name)
        self._last = self._meter()

    def restart(self) -> None:
        """Forget what was counted: it was a warm-up."""
        self.spent.clear()
        self._last = self._meter()


class _Wire:
    """A client's link to nobody: answers have the right shape and type, and mean nothing."""

    def __init__(self, phases: Phases, received: torch.dtype) -> None:
        self._phases, self._received = phases, received
        self._shape: tuple[int, ...] = ()
        self._frozen = False
        self._step = self.bytes_up = self.bytes_down = 0
        self.trunk_seconds = 0.0

    def compute(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfCompute]
    ) -> None:
        self._phases.end("bottom forward")
        self._shape, self._frozen = tuple(h_BTD.shape), how.get("frozen", False)

    def computed(self) -> Tensor:
        return self._answer()

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfBack]
    ) -> None:
        self._phases.end("top")

    def gradients(self) -> tuple[Tensor | None, float]:
        return None if self._frozen else self._answer(), 1.0

    def apply(
        self, step: int, counters: StepCounters, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        self._step = step
        self._phases.end("bottom backward")

    def applied(self) -> StepResult:
        self._phases.end("client step")
        return StepResult(step=self._step, grad_norm=1.0, lr=1e-3)

    def close(self) -> None:
        """There is nobody to leave."""

    def _answer(self) -> Tensor:
        answer = torch.randn(self._shape).to(self._received)
        self._phases.end("wire")
        return answer


class ClientSide:
    """A client's steps, as `streamed.train` takes them.

    Parameters
    ----------
    bottom, top : Part
        Tuned.
    train : TrainConfig
        The run's.
    batches : sequence of Batch
        The micro-batches of a step.
    phases : Phases
        Told of ``bottom forward``, ``top``, ``bottom backward``, ``client step`` and ``wire``,
        which is no work of the client's.
    received : torch.dtype
        Type in which activations and gradients come out of the wire.
    window : int
        Micro-batches under way at once.
    """

    def __init__(
        self,
        bottom: Part,
        top: Part,
        train: TrainConfig,
        batches: Sequence[Batch],
        phases: Phases,
        received: torch.dtype,
        window: int = 1,
    ) -> None:
        place = Place(seed=0, client="plan", round=1, rounds=1)
        link = _Wire(phases, received)
        self._trainer = Trainer(bottom, top, link, STEPS, alone(train), place, window=window)
        self._batches, self._number = batches, 0

    def step(self) -> None:
        """Take one optimizer step."""
        self._trainer.step(self._number, self._batches)
        self._number += 1


class ServerSide:
    """The trunk's steps for one session, as the engine takes them.

    Parameters
    ----------
    trunk : Part
        Tuned.
    train : TrainConfig
        The run's; its strategy says whether the session has a replica.
    shape : tuple of int
        (B, T, D) of a micro-batch.
    micros : int
        Micro-batches of a step.
    phases : Phases
        Told of ``trunk forward``, ``trunk backward``, ``trunk step`` and ``wire``.
    received, window
        As for `ClientSide`.
    wanted : bool
        Whether the bottom learns from dL/dh1.
    """

    def __init__(
        self,
        trunk: Part,
        train: TrainConfig,
        shape: tuple[int, int, int],
        micros: int,
        phases: Phases,
        received: torch.dtype,
        window: int = 1,
        wanted: bool = True,
    ) -> None:
        self._engine = TrunkEngine(
            trunk, hidden_size=shape[-1], train=alone(train), max_in_flight=2**62
        )
        self._engine.open_round(1, 1, training=True)
        self._session: Session = self._engine.open("plan", client="plan", steps=STEPS)
        self._shape, self._micros, self._phases = shape, micros, phases
        self._received, self._window, self._number = received, window, 0
        self._wanted = wanted

    def step(self) -> None:
        """Take one optimizer step."""
        number, phases, tokens = self._number, self._phases, self._shape[0]
        for micro in range(min(self._window, self._micros)):
            self._forward(micro)
        for micro in range(self._micros):
            last = micro == self._micros - 1
            gradient_BTD = self._received_tensor() if self._session.learns(micro) else None
            self._session.backward(number, micro, gradient_BTD, last=last, tokens=tokens)
            phases.end("trunk backward")
            if micro + self._window < self._micros:
                self._forward(micro + self._window)
        self._session.apply(number, client_square_norm=1.0, tokens=tokens)
        phases.end("trunk step")
        self._number += 1

    def _forward(self, micro: int) -> None:
        h_BTD = self._received_tensor()
        self._session.compute(self._number, micro, h_BTD, None, wanted=self._wanted)
        self._phases.end("trunk forward")

    def _received_tensor(self) -> Tensor:
        tensor = torch.randn(self._shape).to(self._received)
        self._phases.end("wire")
        return tensor


class WholeSide:
    """Steps of the unsplit model, as a client of plain federated averaging takes them.

    Parameters
    ----------
    model : PreTrainedModel
        Tuned.
    train, batches, phases :
        As for `ClientSide`; the phases are ``forward and backward`` and ``step``.
    """

    def __init__(
        self, model: PreTrainedModel, train: TrainConfig, batches: Sequence[Batch], phases: Phases
    ) -> None:
        self._model, self._train, self._batches = model.train(), train, batches
        self._parameters, self._phases = trainable(model), phases
        self._optimizer = build_optimizer(self._parameters, train)

    def step(self) -> None:
        """Take one optimizer step."""
        tokens = sum(batch.tokens for batch in self._batches)
        for batch in self._batches:
            with autocast(batch.input_ids.device, self._train.precision):
                logits = self._model(input_ids=batch.input_ids, use_cache=False).logits
                loss, _ = token_loss(logits, batch.labels)
            (loss / tokens).backward()
            del logits, loss
        self._phases.end("forward and backward")
        norm = square_norm(self._parameters) ** 0.5
        clipped_step(self._optimizer, lr=1e-3, norm=norm, clip=self._train.clip)
        self._phases.end("step")


def alone(train: TrainConfig) -> TrainConfig:
    """The settings of a run as one client alone has them, who announces as many steps as it likes.

    Strategies without replicas have one trunk, and a client alone never waits for it.
    """
    strategy = train.strategy if train.strategy == "splitfed-v1" else "splitfed-v2"
    return replace(
        train,
        strategy=strategy,
        turns="arrival",
        sync="round",
        local_steps=0,
        global_batch=0,
    )


def make_batch(sequences: int, tokens: int, vocabulary: int) -> Batch:
    """A batch (B, T) without padding, all of which counts."""
    ids_BT = torch.randint(0, vocabulary, (sequences, tokens))
    return Batch(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), labels=ids_BT)
