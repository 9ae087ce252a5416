"""Which tokens occurred, from the rows of the embedding that moved.

Only rows of tokens that occurred have a gradient (Melis et al. 2019, arXiv:1805.04049); where head
and embedding are one tensor all rows move, and those of tokens that occurred the most.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flower_app.data.client import Example
from models import Part, named_trainable
from simulations.audit.attack import Attack, NotApplicable, Score, Scores
from simulations.audit.observation import PUBLIC, Crossed, Knowledge, Observation, Truth
from simulations.audit.ranks import auc

ROUNDING = 1e-5
"""A row that moved by a smaller share of its length did not: a client subtracts to get it."""


class Rows(Attack):
    """Rows of the embedding's update, or of its gradient with `train.sync=step`."""

    name = "rows"
    reads = ("update",)
    levels: ClassVar[tuple[str, ...]] = (PUBLIC,)
    ends = ("bottom",)
    metric = "AUC"
    finds = 0.9
    margin = 0.15

    def run(
        self, observation: Observation, knowledge: Knowledge, truth: Truth, rng: np.random.Generator
    ) -> Scores:
        """See `Attack.run`."""
        bottom, _ = knowledge.ends(Crossed(step=0, micro=0))
        name = _embedding(bottom)
        if name is None or name not in observation.end:
            raise NotApplicable("the embedding is not trained, or stays with its client")
        step = observation.gradients.get(name)
        moved_VD = observation.end[name] - observation.start[name] if step is None else step
        norms_V = moved_VD.norm(dim=1)[: knowledge.vocabulary]
        least_V = ROUNDING * observation.start[name].norm(dim=1)[: knowledge.vocabulary]
        there_V = _occurred(truth.members if step is None else truth.last, len(norms_V))
        named_V = norms_V > (least_V if step is None else 0.0)
        hits = float((named_V & there_V).sum())
        base, count = float(there_V.float().mean()), int(there_V.sum())
        return {
            self.metric: Score(value=auc(norms_V, there_V), chance=0.5, count=count),
            "precision": Score(value=hits / max(1, int(named_V.sum())), chance=base, count=count),
            "recall": Score(value=hits / max(1, count), chance=None, count=count),
        }

    def shuffled(self, truth: Truth, rng: np.random.Generator) -> Truth:
        """The same number of tokens, but others."""
        members = [*truth.members, *truth.last]
        size = 1 + max(int(each.input_ids.max()) for each in members)
        other_V = torch.from_numpy(rng.permutation(size))
        return replace(
            truth,
            members=[Example(other_V[each.input_ids], each.labels) for each in truth.members],
            last=[Example(other_V[each.input_ids], each.labels) for each in truth.last],
        )


def _embedding(bottom: Part) -> str | None:
    """What the whole model calls the embedding, if it is trained."""
    own = getattr(bottom.model.get_input_embeddings(), "weight", None)
    names = [name for name, each in named_trainable(bottom).items() if each is own]
    return names[0] if names else None


def _occurred(examples: Sequence[Example], vocabulary: int) -> Tensor:
    """Which tokens are in any of the examples (V,)."""
    there_V = torch.zeros(vocabulary, dtype=torch.bool)
    for example in examples:
        there_V[example.input_ids] = True
    return there_V
