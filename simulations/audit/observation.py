"""What a curious party has of a round, what it may know beside, and the truth, kept apart.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.schema import Config
from flower_app.data.client import Batch, Example
from models import Part

EXACT, STALE, START, PUBLIC = "exact", "round", "pretrained", "public"
LEVELS = (EXACT, STALE, START, PUBLIC)
"""What an attacker knows of the ends: those of the very step; those that the round began with, some
steps stale; the model that the run began with; the architecture and public text alone."""

SERVER, CLIENT = "server", "client"
"""Who looks."""
WHO = (SERVER, CLIENT)

State = Mapping[str, Tensor]
"""Trained tensors of both ends, by name in the whole model."""


@dataclass(eq=False, kw_only=True)
class Crossed:
    """A micro-batch as it crossed both cuts: what the receiver decodes, after codec and defences.
    What did not cross is None."""

    step: int
    micro: int
    mask_BT: Tensor | None = None
    """None: no padding."""
    h1_BTD: Tensor | None = None
    h2_BTD: Tensor | None = None
    grad_h2_BTD: Tensor | None = None
    grad_h1_BTD: Tensor | None = None
    tokens: int = 0
    """That count in the whole step, as the client says."""

    def to(self, device: torch.device) -> Crossed:
        """The same on a device; as it is recorded it is on the CPU."""
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def texts(self) -> list[Tensor]:
        """h1 of each text (T, D), without padding; none, if none crossed."""
        if self.h1_BTD is None:
            return []
        if self.mask_BT is None:
            return list(self.h1_BTD)
        both = zip(self.h1_BTD, self.mask_BT, strict=True)
        return [h1_TD[mask_T.bool()] for h1_TD, mask_T in both]


@dataclass(eq=False, kw_only=True)
class Observation:
    """What the server, or another client, has of one client's round."""

    config: Config
    client: str
    crossed: Sequence[Crossed]
    """What is attacked: of the last step. Nothing, where a client looks."""
    heard: Sequence[Crossed] = ()
    """Of all steps of the round, whole. Nothing, where a client looks."""
    start: State
    """The averaged ends that the round began with; empty where they stay with their clients."""
    end: State
    """The client's own ends after the round, before they are averaged; empty where they stay. Where
    a client looks: what is left of the average without its own share."""
    gradients: State = field(default_factory=dict)
    """Of the ends in the last step, with `train.sync=step`."""
    trunk_start: State = field(default_factory=dict)
    """The trunk that the round began with."""
    trunk_end: State = field(default_factory=dict)
    """The client's replica after the round, or the trunk that all share. Where a client looks: the
    trunk after the round, which it never sees, but can ask."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Canary:
    """A secret that was put into a client's text."""

    repeats: int
    before: str
    secret: str
    """Digits, which all were as likely."""


@dataclass(eq=False, kw_only=True)
class Truth:
    """What the clients alone have. An attack never sees it."""

    batches: Sequence[Batch]
    """In the order of `Observation.crossed`."""
    last: Sequence[Example] = ()
    """All of the last step's."""
    members: Sequence[Example] = ()
    """What was trained on in the round."""
    strangers: Sequence[Example] = ()
    """Of the same client's data, and not trained on."""
    canaries: Sequence[Canary] = ()


@dataclass(eq=False, kw_only=True)
class Knowledge:
    """What the attacker has beside the observation."""

    level: str
    """One of `LEVELS`."""
    ends: Callable[[Crossed], tuple[Part, Part]]
    """Bottom and top as the attacker has them for a micro-batch, in evaluation mode. At level
    `public` parts of the architecture with random weights of the attacker's own."""
    loss: Callable[[State, State, Sequence[Example]], Tensor]
    """Summed loss (N,) of examples under a whole model of which these ends and this trunk are the
    trained tensors."""
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    public: Sequence[Sequence[int]] = field(default_factory=list)
    """Public text, as ids."""
    sent: Callable[[Tensor], Tensor] = lambda h_BTD: h_BTD
    """What of the defence is no chance, applied to h1: an adaptive attacker compares what it
    guesses as the client would have sent it."""
    noise: float = 0.0
    """Deviation of the noise that the defence adds to each element of h1."""
    rough: bool = False
    """Whether h1 is no longer what the bottom gave out, by noise or by rounding that shows."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where parts are, and what is guessed is computed."""
    trunk: Part | None = None
    """The server's own. With the ends it is a language model, which says what a text may say."""
