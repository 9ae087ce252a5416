"""A recorded round, and what attackers of each level know of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from conf.schema import Config
from flower_app.client.ends import on_device
from flower_app.data.client import IGNORED, Example, batches, load_tokenizer
from models import Part, Parts, load_client_state, load_trainable_state
from simulations.audit.adaptive import as_sent
from simulations.audit.observation import (
    EXACT,
    PUBLIC,
    SERVER,
    STALE,
    START,
    Knowledge,
    Observation,
    State,
    Truth,
)
from simulations.audit.texts import public_ids

PUBLIC_TEXTS = 400
"""Pieces of public text, of a context each, at most."""

EXACT_CODECS = ("fp32", "bf16", "fp16")
"""That round less than tokens differ."""
TOGETHER = 32
"""Examples whose loss is computed at once."""


@dataclass(frozen=True, kw_only=True)
class Scope:
    """How much is trained and attacked."""

    clients: int = 2
    warm: int = 40
    """Steps of the round before the recorded one, so that ends are no longer what the run began
    with. Where a run has trained before: 0."""
    steps: int = 8
    """Of the recorded round."""
    sequences: int = 4
    """Attacked of each client's last step."""
    canaries: tuple[int, ...] = ()
    """How often each secret is planted among what a client trains on in the recorded round."""
    reuse: int = 1
    """Steps over the same examples, on average."""


@dataclass(eq=False, kw_only=True)
class Watched:
    """One client's recorded round."""

    observation: Observation
    truth: Truth
    exact: State
    """Its ends when the attacked h1 was made."""
    weight: float = 1.0
    """In the average: the tokens that it learned from."""


@dataclass(eq=False)
class Recording:
    """A recorded round of all clients, and what attackers may know of it."""

    config: Config
    clients: list[Watched] = field(default_factory=list)
    first: State = field(default_factory=dict)
    """Ends that the run began with."""
    round_start: State = field(default_factory=dict)
    round_end: State = field(default_factory=dict)
    """Averaged ends after the round."""
    trunk_end: State = field(default_factory=dict)
    """The trunk after the round, averaged if need be."""
    parts: Parts | None = None
    """To be filled with any of these."""

    def seen_by(self, who: str) -> list[Watched]:
        """Each client as the server sees it, or as each of the other clients does.

        A client subtracts its own share of the averaged ends. With two clients the other's ends are
        left, with more the mean of the others', held against each of them. Nobody is seen with
        `train.sync=step`, where the ends of all are one at every step.
        """
        if who == SERVER:
            return self.clients
        if any(each.observation.gradients for each in self.clients):
            return []
        return [
            self._seen(other, by)
            for by in self.clients
            for other in self.clients
            if other is not by
        ]

    def _seen(self, other: Watched, by: Watched) -> Watched:
        share, own = by.weight / sum(each.weight for each in self.clients), by.observation.end
        left = {
            name: ((mean.double() - share * own[name].double()) / (1 - share)).to(mean.dtype)
            for name, mean in self.round_end.items()
        }
        observation = replace(
            other.observation,
            crossed=(),
            heard=(),
            end=left,
            gradients={},
            trunk_end=self.trunk_end,
        )
        return replace(other, observation=observation)

    def knowledge(self, client: Watched, level: str) -> Knowledge:
        """What an attacker of this level has against a client."""
        states = {EXACT: client.exact, STALE: self.round_start, START: self.first}
        bottom, top = self._foreign if level == PUBLIC else self._ends(states[level])
        observation = client.observation
        sent, noise = as_sent(observation.config.privacy, bottom, observation.crossed, self.public)
        return Knowledge(
            level=level,
            device=bottom.device,
            ends=lambda crossed: (bottom, top),
            loss=self._loss,
            tokenizer=self.tokenizer,
            vocabulary=self.vocabulary,
            public=self.public,
            sent=sent,
            noise=noise,
            rough=bool(noise) or observation.config.link.codec["h1"] not in EXACT_CODECS,
            trunk=self._copy.trunk.eval(),
        )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's, which takes long to read out of a .gguf file."""
        return load_tokenizer(self.config.model)

    @cached_property
    def vocabulary(self) -> int:
        """How many ids a text may have: those of the tokenizer that the model embeds."""
        assert self.parts is not None
        own = self.parts.bottom.config.get_text_config(decoder=True).vocab_size
        return min(len(self.tokenizer), own)

    @cached_property
    def public(self) -> list[list[int]]:
        """Public text as ids."""
        return public_ids(self.tokenizer, self.config.data.context, PUBLIC_TEXTS, self.vocabulary)

    @torch.no_grad()
    def _loss(self, ends: State, trunk: State, examples: Sequence[Example]) -> Tensor:
        assert self.parts is not None
        bottom, middle, top = (part.eval() for part in self._copy)
        load_client_state(bottom, top, ends)
        load_trainable_state(middle, trunk)
        losses = []
        for batch in batches(examples, TOGETHER, pad_id=0):
            ids_BT, mask_BT, labels_BT = on_device(bottom.device, batch)
            logits_BTV = top(middle(bottom(ids_BT, mask_BT), mask_BT), mask_BT)
            losses.append(_losses(logits_BTV, labels_BT).cpu())
        return torch.cat(losses)

    @cached_property
    def _copy(self) -> Parts:
        return copy.deepcopy(self.parts)  # type: ignore[return-value]

    def _ends(self, state: State) -> tuple[Part, Part]:
        assert self.parts is not None
        bottom, top = copy.deepcopy((self.parts.bottom, self.parts.top))
        load_client_state(bottom, top, state)
        return bottom.eval(), top.eval()

    @cached_property
    def _foreign(self) -> tuple[Part, Part]:
        """Ends of the architecture with random weights: all that is known without the model."""
        assert self.parts is not None
        bottom, top = copy.deepcopy((self.parts.bottom, self.parts.top))
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        for part in (bottom, top):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    scale = float(parameter.detach().std())
                    random = torch.randn(parameter.shape, generator=generator)
                    parameter.data = scale * random.to(parameter)
        return bottom.eval(), top.eval()


def _losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed cross-entropy of each sequence (B,)."""
    targets_BT = labels_BT[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().transpose(1, 2),
        targets_BT,
        ignore_index=IGNORED,
        reduction="none",
    ).sum(1)
