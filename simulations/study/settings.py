"""What the study runs on: sizes, the model's config, and each client's batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from conf.schema import DataConfig, ModelConfig, TrainConfig
from flower_app.data.client import Batch, ClientData, load_client_data, load_tokenizer, steps
from models.tiny import byte_llama
from simulations.study import methods as study_methods
from simulations.study.methods import Cohort
from strategies.optim import derive_seed


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is run. The defaults are the full study; `quick` has the same shape in a minute."""

    clients: int = 8
    rounds: int = 8
    local_steps: int = 12
    batch_size: int = 4
    context: int = 128
    hidden: int = 64
    blocks: int = 4
    cut: tuple[int, int] = (1, 1)
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Learning rates tried, with the first seed, for each method and division."""
    heldout: float = 0.05
    max_examples: int = 0
    """As in `data`."""

    def train(self, method: str, lr: float) -> TrainConfig:
        """Settings of one method; all but the strategy and the learning rate are alike."""
        return study_methods.settings(
            method,
            rounds=self.rounds,
            local_steps=self.local_steps,
            batch_size=self.batch_size,
            lr=lr,
            schedule="cosine",
        )


QUICK = Study(
    rounds=2, local_steps=3, hidden=32, seeds=(0,), rates=(4e-3,), heldout=0.1, max_examples=60
)


def scratch(study: Study) -> dict[str, Any]:
    """The config of a byte-level Llama with random weights."""
    return byte_llama(study.hidden, study.blocks, study.context)


@lru_cache(maxsize=8)
def load_clients(study: Study, division: str, seed: int) -> list[ClientData]:
    """The examples of all clients."""
    tokenizer = load_tokenizer(ModelConfig(scratch=scratch(study), tokenizer="bytes"))
    config = DataConfig(
        partitioner=division,
        context=study.context,
        heldout=study.heldout,
        max_examples=study.max_examples,
    )
    return [
        load_client_data(config, tokenizer, partition=client, partitions=study.clients, seed=seed)
        for client in range(study.clients)
    ]


def cohort_of(study: Study, clients: Sequence[ClientData], seed: int, number: int) -> Cohort:
    """Each client's batches of one round, shuffled as the ClientApp does it."""
    return [
        list(_steps(study, data, derive_seed(seed, number, f"client-{client}", "order")))
        for client, data in enumerate(clients)
    ]


def divergence(clients: Sequence[ClientData], vocabulary: int = 259) -> float:
    """How much clients differ: the Jensen-Shannon divergence of their pairs of neighbours.

    Parameters
    ----------
    clients : sequence of ClientData
        Each has the same weight.
    vocabulary : int
        Number of token ids.

    Returns
    -------
    float
        Nats: 0 if all have the same pairs equally often, log K if K clients share none. A finite
        text divided at random has some, too.
    """
    shares = []
    for data in clients:
        counts = np.zeros(vocabulary**2)
        for example in data.train:
            ids = example.input_ids.numpy()
            np.add.at(counts, ids[:-1] * vocabulary + ids[1:], 1)
        shares.append(counts / counts.sum())
    return _entropy(np.mean(shares, axis=0)) - float(np.mean([_entropy(s) for s in shares]))


def _entropy(share: np.ndarray) -> float:
    some = share[share > 0]
    return float(-(some * np.log(some)).sum())


def _steps(study: Study, data: ClientData, seed: int) -> Iterator[list[Batch]]:
    return steps(
        data.train,
        batch_size=study.batch_size,
        accumulate=1,
        steps=study.local_steps,
        pad_id=0,
        generator=torch.Generator().manual_seed(seed),
    )
