"""Secrets that were planted in the text, by exposure (Carlini et al. 2019, arXiv:1802.08232).

Exposure is log2 of how many secrets there could be, less log2 of the true one's rank by the loss
of the client's model; here among random ones, so that it ends at log2 of their number.

Shapes: N secrets.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from conf.schema import Config
from flower_app.data.client import Example
from simulations.audit.attack import Attack, NotApplicable, Score, Scores
from simulations.audit.observation import STALE, Canary, Knowledge, Observation, Truth
from simulations.audit.recording import Scope

OTHERS = 255
"""Secrets that the true one is ranked among."""
BLIND = 1 / math.log(2)
"""Exposure in the mean, in bits, of a secret whose rank is a matter of chance."""


class Canaries(Attack):
    """The true secret's rank among random ones, by how much the round lowered their loss."""

    name = "canaries"
    reads = ("update", "loss")
    levels: ClassVar[tuple[str, ...]] = (STALE,)
    ends = ("bottom", "top")
    metric = "exposure"
    finds = 4.0
    margin = 2.5
    plants = (1, 8)

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`."""
        if not observation.end:
            raise NotApplicable("the ends stay with their clients")
        scores = {
            f"exposure, {each.repeats} times": _exposure(each, observation, knowledge, rng)
            for each in truth.canaries
        }
        most = max(truth.canaries, key=lambda each: each.repeats)
        return {self.metric: scores[f"exposure, {most.repeats} times"], **scores}

    def planted(self, config: Config, scope: Scope) -> tuple[Config, Scope]:
        """One secret, in nearly all that is trained on."""
        size = config.train.batch_size * config.train.accumulate
        return config, Scope(clients=1, warm=4, steps=24, sequences=1, canaries=(20 * size,))

    def shuffled(self, truth: Truth, rng: np.random.Generator) -> Truth:
        """Other secrets."""
        return replace(
            truth, canaries=[replace(each, secret=_other(each, rng)) for each in truth.canaries]
        )


def _exposure(
    canary: Canary, observation: Observation, knowledge: Knowledge, rng: np.random.Generator
) -> Score:
    secrets = [canary.secret, *(_other(canary, rng) for _ in range(OTHERS))]
    examples = [_example(canary.before + secret, knowledge) for secret in secrets]
    before_N = knowledge.loss(observation.start, observation.trunk_start, examples)
    after_N = knowledge.loss(observation.end, observation.trunk_end, examples)
    fell_N = before_N - after_N
    rank = 1 + int((fell_N[1:] > fell_N[0]).sum())
    return Score(value=math.log2((OTHERS + 1) / rank), chance=BLIND, count=1)


def _other(canary: Canary, rng: np.random.Generator) -> str:
    return "".join(map(str, rng.integers(10, size=len(canary.secret))))


def _example(text: str, knowledge: Knowledge) -> Example:
    ids_T = torch.tensor(knowledge.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Example(ids_T, ids_T)
