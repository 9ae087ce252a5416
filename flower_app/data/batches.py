"""Examples become padded batches, and batches the steps of a round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from conf.schema import TrainConfig
from flower_app.data.examples import IGNORED, Example


@dataclass(frozen=True, eq=False)
class Batch:
    """B examples padded on the right to the longest; all tensors are (B, T) int64."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    """1 for a token, 0 for padding."""
    labels: torch.Tensor
    """The token's own id, or -100 for padding, for what is not learned, and for what comes after
    padding: its activations do not travel, so nothing is predicted from them. Not shifted."""

    @cached_property
    def tokens(self) -> int:
        """Number of labels that count after the shift: the denominator of the mean loss."""
        return int((self.labels[:, 1:] != IGNORED).sum())


def batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Iterator[Batch]:
    """Yield one epoch of batches; the last may be smaller.

    Parameters
    ----------
    pad_id : int
        Fills `input_ids` where the mask is 0.
    generator : torch.Generator | None
        Shuffles the examples; None keeps their order.

    Raises
    ------
    ValueError
        If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    order = range(len(examples))
    if generator is not None:
        order = torch.randperm(len(examples), generator=generator).tolist()
    for start in range(0, len(order), batch_size):
        yield _collate([examples[index] for index in order[start : start + batch_size]], pad_id)


def steps(
    examples: Sequence[Example],
    *,
    batch_size: int,
    accumulate: int,
    steps: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of exactly `steps` optimizer steps.

    Epochs follow one another, each shuffled anew. A step does not reach into the next epoch: the
    last of an epoch may have fewer than `accumulate` micro-batches, which is why a loss is divided
    by the tokens of the step, not by the number of micro-batches.

    Raises
    ------
    ValueError
        If there are no examples, or `batch_size` or `accumulate` is below 1.
    """
    if not examples or accumulate < 1:
        raise ValueError(f"no steps from {len(examples)} examples with accumulate={accumulate}")
    done = 0
    while done < steps:
        epoch = list(batches(examples, batch_size, pad_id=pad_id, generator=generator))
        for start in range(0, len(epoch), accumulate):
            if done == steps:
                return
            yield epoch[start : start + accumulate]
            done += 1


def num_steps(examples: int, train: TrainConfig) -> int:
    """Return the optimizer steps of one client and round: `local_steps`, or those of its epochs."""
    if train.local_steps:
        return train.local_steps
    micro_batches = math.ceil(examples / train.batch_size)
    return train.local_epochs * math.ceil(micro_batches / train.accumulate)


def _collate(examples: Sequence[Example], pad_id: int) -> Batch:
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = example.input_ids
        mask[row, :length] = 1
        labels[row, :length] = example.labels
    return Batch(input_ids, mask, labels)
