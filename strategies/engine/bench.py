"""What all sessions of one trunk share: its device and limits, and forwards that can be repeated.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from conf.schema import TrainConfig
from strategies.engine.checks import InFlight, check_shapes
from strategies.engine.member import Member, Round
from strategies.engine.meter import SILENT, Meter
from strategies.optim import ALONE, autocast, derive_seed


class Bench:
    """Where micro-batches are worked on.

    Parameters
    ----------
    device : torch.device
        Of the trunk.
    hidden_size : int
        D.
    train : TrainConfig
        The run's.
    seed : int
        Seed of the run.
    timeout : float
        Seconds a session may wait for its turn.
    max_sequences, max_tokens : int
        Largest B and T.
    max_graphs : int
        Micro-batches of one session whose graphs may wait at once; 0: all of a step.
    max_in_flight : int
        Most bytes that wait for their step, over all sessions.
    meter : Meter
        Told of the work.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        hidden_size: int,
        train: TrainConfig,
        seed: int,
        timeout: float,
        max_sequences: int,
        max_tokens: int,
        max_graphs: int,
        max_in_flight: int,
        meter: Meter = SILENT,
    ) -> None:
        self.meter = meter
        self.device, self.train, self.timeout = device, train, timeout
        self.hidden_size = hidden_size
        self.max_sequences, self.max_tokens = max_sequences, max_tokens
        # A drawn batch may fall to one client as a whole.
        drawn = math.ceil(train.global_batch / train.batch_size)
        self.max_micro_batches = max(train.accumulate, drawn)
        self.max_graphs = max_graphs or self.max_micro_batches
        self.in_flight = InFlight(max_in_flight)
        self._seed = seed

    def codec_seed(self, client: str, round: Round) -> int:
        """What the codecs of a client's session in a round draw from."""
        return derive_seed(self._seed, round.number, client, "codec")

    @property
    def most_tokens(self) -> int:
        """More tokens than a step's micro-batches can hold are a lie."""
        return self.max_micro_batches * self.max_sequences * self.max_tokens

    def check_shapes(self, shape: tuple[int, ...], mask_shape: tuple[int, ...] | None) -> None:
        """Refuse a shape before anything is made of it: activations (B, T, D) and mask (B, T)."""
        check_shapes(shape, mask_shape, self.hidden_size, self.max_sequences, self.max_tokens)

    def forward(self, module: nn.Module, h_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The module's output (B, T, D), in the run's precision."""
        with autocast(self.device, self.train.precision):
            output: Tensor = module(h_BTD, mask_BT)
        return output

    def seeded_forward(
        self,
        module: nn.Module,
        h_BTD: Tensor,
        mask_BT: Tensor | None,
        member: Member,
        *place: object,
    ) -> Tensor:
        """As `forward`; dropout depends on the run's seed, the member's round and the place."""
        with self._seeded(member.round.number, *place):
            return self.forward(module, h_BTD, mask_BT)

    @contextmanager
    def _seeded(self, *parts: object) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        # torch has one generator for dropout in the process, so seeded forwards go one by one.
        # Those of a trunk without dropout never come here, and run at once.
        with ALONE, torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(self._seed, *parts))
            yield
