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
    for indices in _epoch(len(examples), batch_size, generator):
        yield collate(examples, indices, pad_id)


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
    planned = plan_steps(
        len(examples),
        batch_size=batch_size,
        accumulate=accumulate,
        steps=steps,
        generator=generator,
    )
    for step in planned:
        yield [collate(examples, indices, pad_id) for indices in step]


def plan_steps(
    examples: int,
    *,
    batch_size: int,
    accumulate: int,
    steps: int,
    generator: torch.Generator | None = None,
) -> Iterator[list[list[int]]]:
    """Yield which examples, by index, each micro-batch of each optimizer step has; see `steps`."""
    if not examples or accumulate < 1:
        raise ValueError(f"no steps from {examples} examples with accumulate={accumulate}")
    done = 0
    while done < steps:
        epoch = _epoch(examples, batch_size, generator)
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


def _epoch(examples: int, batch_size: int, generator: torch.Generator | None) -> list[list[int]]:
    """Which examples each batch of an epoch has."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    order = list(range(examples))
    if generator is not None:
        order = torch.randperm(examples, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, examples, batch_size)]


def collate(examples: Sequence[Example], indices: Sequence[int], pad_id: int) -> Batch:
    """Put these examples into one batch."""
    return _collate([examples[index] for index in indices], pad_id)


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
