"""A truth that nothing could know: what an attack scores on it is chance.

Shapes: B sequences, T tokens, N tokens that are no padding.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from flower_app.data.client import IGNORED, Batch
from simulations.audit.observation import Truth


def shuffle(truth: Truth, rng: np.random.Generator) -> Truth:
    """The same tokens in other places, and members and strangers mixed."""
    everybody = [*truth.members, *truth.strangers]
    order = [everybody[i] for i in rng.permutation(len(everybody))]
    return replace(
        truth,
        batches=[_shuffled(batch, rng) for batch in truth.batches],
        members=order[: len(truth.members)],
        strangers=order[len(truth.members) :],
    )


def _shuffled(batch: Batch, rng: np.random.Generator) -> Batch:
    real_BT = batch.attention_mask.bool()
    ids_N = batch.input_ids[real_BT]
    ids_BT, labels_BT = batch.input_ids.clone(), batch.labels.clone()
    ids_BT[real_BT] = ids_N[torch.from_numpy(rng.permutation(len(ids_N)))]
    learned_BT = labels_BT != IGNORED
    labels_BT[learned_BT] = ids_BT[learned_BT]
    return Batch(ids_BT, batch.attention_mask, labels_BT)
