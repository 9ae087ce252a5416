"""Was an example trained on? By how much its loss fell while the client trained.

The server holds both ends before and after the round, and the trunk: so it has the whole model of
the client. The loss before it trained says how hard the example is (the offset of Watson et al.
2022, arXiv:2111.08440).

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from conf.schema import Config
from flower_app.data.client import Example
from simulations.audit.attack import Attack, NotApplicable, Score, Scores
from simulations.audit.observation import STALE, Knowledge, Observation, Truth
from simulations.audit.ranks import auc, hits_at
from simulations.audit.recording import Scope

MOST = 100
"""Members, and as many strangers."""
ALARMS = 0.01


class Membership(Attack):
    """Loss before the round less loss after it."""

    name = "membership"
    reads = ("update", "loss")
    levels: ClassVar[tuple[str, ...]] = (STALE,)
    ends = ("bottom", "top")
    metric = "AUC"
    finds = 0.8
    margin = 0.15

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`."""
        if not observation.end:
            raise NotApplicable("the ends stay with their clients")
        groups = [_some(truth.members, rng), _some(truth.strangers, rng)]
        if not all(groups):
            raise NotApplicable("there is no held-out example to compare members with")
        examples = [each for group in groups for each in group]
        before_N = knowledge.loss(observation.start, observation.trunk_start, examples)
        after_N = knowledge.loss(observation.end, observation.trunk_end, examples)
        tokens_N = torch.tensor([int((each.labels[1:] >= 0).sum()) for each in examples])
        fell_N = (before_N - after_N) / tokens_N
        member_N = torch.tensor([True] * len(groups[0]) + [False] * len(groups[1]))
        return {
            self.metric: Score(value=auc(fell_N, member_N), chance=0.5, count=len(member_N)),
            "TPR at 1 % FPR": Score(
                value=hits_at(fell_N, member_N, ALARMS), chance=ALARMS, count=len(groups[0])
            ),
        }

    def planted(self, config: Config, scope: Scope) -> tuple[Config, Scope]:
        """Few examples, each learned many times."""
        return config, Scope(clients=1, warm=4, steps=80, sequences=1, reuse=80)


def _some(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """Different examples, `MOST` of them."""
    each = list({tuple(example.input_ids.tolist()): example for example in examples}.values())
    return [each[i] for i in rng.permutation(len(each))[:MOST]]
