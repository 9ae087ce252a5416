"""what OpenAI's parameters do to the logits of a step, as `transformers`' logits processors

Shapes: B rows, T positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from simulations.api.scores import Scored, scored
from simulations.api.wanted import Wanted


class Recorder(LogitsProcessor):
    """Keeps a step's logits as they came from the model, until its token is known."""

    def __init__(self) -> None:
        self._logits: dict[int, Tensor] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the logits under the place of the token that they will choose.

        A draft that is taken back comes again at its place, and replaces what was kept.
        """
        self._logits[input_ids.shape[1]] = scores[0].detach().float().cpu()
        return scores

    def take(self, place: int, token: int, top: int) -> Scored:
        """Return how probable the token that came to stand at `place` was."""
        return scored(token, self._logits.pop(place), top)


class Penalties(LogitsProcessor):
    """OpenAI's frequency and presence penalties: of what was generated, not of the prompt.

    logit[j] -= count[j] * frequency + (count[j] > 0) * presence
    """

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self._prompt, self._frequency, self._presence = prompt, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Lower the logits of tokens that were generated already."""
        new_BT = input_ids[:, self._prompt :]
        counts_BV = torch.zeros_like(scores).scatter_add_(
            1, new_BT, torch.ones_like(new_BT, dtype=scores.dtype)
        )
        return scores - counts_BV * self._frequency - (counts_BV > 0) * self._presence


class Bias(LogitsProcessor):
    """Adds a number to the logits of given tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens, self._amounts = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the biases."""
        tokens = self._tokens.to(scores.device)
        amounts_BV = self._amounts.to(scores).expand(scores.shape[0], -1)
        return scores.index_add(1, tokens, amounts_BV)


def processors(wanted: Wanted, prompt: int, recorder: Recorder | None) -> LogitsProcessorList:
    """Return what changes the logits of an answer to a prompt of `prompt` tokens, in order.

    The recorder is the first: it sees the distribution that is the model's own.
    """
    found = LogitsProcessorList()
    if recorder is not None:
        found.append(recorder)
    if wanted.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty))
    if wanted.frequency_penalty or wanted.presence_penalty:
        found.append(Penalties(prompt, wanted.frequency_penalty, wanted.presence_penalty))
    if wanted.logit_bias:
        found.append(Bias(wanted.logit_bias))
    return found
