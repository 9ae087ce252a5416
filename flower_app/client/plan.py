"""What a client trains on in a round, step by step: the same plan in every process that asks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from conf.schema import Config
from flower_app.client.place import Place
from flower_app.data.batches import Batch, collate, num_steps, plan_steps
from flower_app.data.text import Example
from models import Part
from strategies.optim import derive_seed


class Plan:
    """The micro-batches of each optimizer step of one client and round.

    Parameters
    ----------
    examples : sequence of Example
        The client's training examples.
    config : Config
        Batch size, accumulation, steps or epochs, seed.
    place : Place
        The client and the round: what the order depends on.
    pad_id : int
        Fills a batch where there is no token.
    sizes : sequence of int, optional
        Examples of each step as the server drew them (`train.global_batch`); 0 is a step without.
        They come in as many micro-batches of `train.batch_size` as it takes.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: Config,
        place: Place,
        *,
        pad_id: int,
        sizes: Sequence[int] = (),
    ) -> None:
        self._examples, self._train, self._pad_id, self._sizes = (
            examples, config.train, pad_id, list(sizes),
        )  # fmt: skip
        self.count = len(self._sizes) or num_steps(len(examples), config.train)
        self._seed = derive_seed(config.seed, place.round, place.client, "order")

    def __iter__(self) -> Iterator[list[Batch]]:
        return (self._collated(step) for step in self._planned())

    def __getitem__(self, step: int) -> list[Batch]:
        return self._collated(next(itertools.islice(self._planned(), step, None)))

    def _collated(self, step: Sequence[Sequence[int]]) -> list[Batch]:
        return [collate(self._examples, indices, self._pad_id) for indices in step]

    def _planned(self) -> Iterator[list[list[int]]]:
        """Which examples each micro-batch of each step has: cheap, though all before is planned."""
        generator = torch.Generator().manual_seed(self._seed)
        if self._sizes:
            return self._drawn(generator)
        return plan_steps(
            len(self._examples),
            batch_size=self._train.batch_size,
            accumulate=self._train.accumulate,
            steps=self.count,
            generator=generator,
        )

    def _drawn(self, generator: torch.Generator) -> Iterator[list[list[int]]]:
        """Without replacement until all examples were seen, then anew."""
        order: list[int] = []
        most = self._train.batch_size
        for size in self._sizes:
            while len(order) < size:
                order += torch.randperm(len(self._examples), generator=generator).tolist()
            chosen, order = order[:size], order[size:]
            yield [chosen[start : start + most] for start in range(0, size, most)]


def padding_id(bottom: Part, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what fills a batch: 0 if the model does not embed the tokenizer's own padding token.

    Padding is masked by length, so any token will do that torch can look up.
    """
    own = int(tokenizer.pad_token_id)
    return own if own < bottom.config.get_text_config(decoder=True).vocab_size else 0


def check_fit(bottom: Part, examples: Sequence[Example], context: int) -> None:
    """Refuse texts that the model cannot embed, which torch would answer with an IndexError."""
    check_embeds(bottom.config, examples, context)


def check_embeds(model: PretrainedConfig, examples: Sequence[Example], context: int) -> None:
    """Refuse texts that a model of this configuration cannot embed."""
    config = model.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and context > positions:
        raise ValueError(
            f"data.context={context} exceeds the {positions} positions of this model; lower it"
        )
    largest = max((int(example.input_ids.max()) for example in examples), default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gave id {largest}, the model embeds {config.vocab_size}; set "
            "model.tokenizer to the model's own, or leave it empty"
        )
