"""Training of an unsplit model in plain PyTorch: what Graft is compared with.

Nothing here comes from Graft's strategies, optimizers or client code, on purpose: a mistake of
theirs cannot hide in a copy of itself.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from conf.schema import TrainConfig
from flower_app.data.client import IGNORED, Batch

Steps = Sequence[Sequence[Batch]]
"""The micro-batches of each optimizer step of one client."""


def train_whole(
    model: PreTrainedModel,
    steps: Steps,
    train: TrainConfig,
    round: int = 1,
    rounds: int = 1,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[list[float], int]:
    """Train an unsplit model for one round, in place.

    Parameters
    ----------
    model : PreTrainedModel
        Those of its parameters that require gradients are trained.
    steps : sequence of sequences of Batch
        A step minimises the mean loss over all tokens of its micro-batches.
    train : TrainConfig
        Optimizer, learning rate, clipping; schedule `constant` or `cosine`.
    round, rounds : int
        Which round of how many, for the schedule.
    optimizer : Optimizer, optional
        One that goes on from earlier rounds; by default a fresh one.

    Returns
    -------
    losses : list of float
        Mean loss of each step, before it.
    tokens : int
        Tokens that counted, in all steps.
    """
    optimizer = optimizer or plain_optimizer(model, train)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    losses, all_tokens = [], 0
    for index, batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(train, (round - 1 + index / len(steps)) / rounds)
        totals, counts = zip(*(_loss(model, batch) for batch in batches), strict=True)
        loss = torch.stack(totals).sum() / sum(counts)
        loss.backward()
        if train.clip:
            nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        all_tokens += sum(counts)
    model.eval()
    return losses, all_tokens


def fed_avg_round(
    whole: PreTrainedModel, cohort: Sequence[Steps], train: TrainConfig, round: int, rounds: int
) -> None:
    """One round of FedAvg (McMahan et al. 2017, arXiv:1602.05629) of unsplit copies, in place.

    Every client starts from `whole` with a fresh optimizer; the mean is weighted by tokens.

    Parameters
    ----------
    whole : PreTrainedModel
        The global model.
    cohort : sequence of steps
        One entry per client.
    train : TrainConfig
        As in `train_whole`.
    round, rounds : int
        Which round of how many, for the schedule.
    """
    copies, weights = [], []
    for steps in cohort:
        local = copy.deepcopy(whole)
        weights.append(train_whole(local, steps, train, round, rounds)[1])
        copies.append(dict(local.named_parameters()))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            mean = sum(w * c[name] for w, c in zip(weights, copies, strict=True)) / sum(weights)
            parameter.copy_(mean)  # type: ignore[arg-type]


def centralised_round(
    whole: PreTrainedModel,
    cohort: Sequence[Steps],
    train: TrainConfig,
    round: int,
    rounds: int,
    *,
    optimizer: torch.optim.Optimizer,
) -> tuple[list[float], int]:
    """One round of training where all data is in one place, in place.

    Step s takes what every client would have taken in its step s, as one batch, and minimises the
    mean loss over all its tokens.

    Parameters
    ----------
    whole : PreTrainedModel
        The model.
    cohort : sequence of steps
        One entry per client; a client that has no step s is left out of it.
    train : TrainConfig
        As in `train_whole`.
    round, rounds : int
        Which round of how many, for the schedule.
    optimizer : Optimizer
        Of `plain_optimizer`, the same one in all rounds.

    Returns
    -------
    losses : list of float
        Mean loss of each step, before it.
    tokens : int
        Tokens that counted, in all steps.
    """
    joined = [
        [concatenated([batch for batches in together if batches for batch in batches])]
        for together in itertools.zip_longest(*cohort)
    ]
    return train_whole(whole, joined, train, round, rounds, optimizer=optimizer)


def plain_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over all trainable parameters of a model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=train.lr,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
        )
    return torch.optim.SGD(
        parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
    )


def concatenated(batches: Sequence[Batch]) -> Batch:
    """One batch of all sequences, padded on the right to the longest."""
    longest = max(batch.input_ids.shape[1] for batch in batches)

    def joined(name: str, fill: int) -> Tensor:
        tensors: list[Tensor] = [getattr(batch, name) for batch in batches]
        return torch.cat([F.pad(t, (0, longest - t.shape[1]), value=fill) for t in tensors])

    return Batch(joined("input_ids", 0), joined("attention_mask", 0), joined("labels", IGNORED))


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[float, int]:
    """Mean loss per token over all batches, in nats, and how many tokens there are."""
    model.eval()
    totals, counts = zip(*(_loss(model, batch) for batch in batches), strict=True)
    return float(torch.stack(totals).double().sum()) / sum(counts), sum(counts)


def _loss(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Summed cross-entropy of the next token, and over how many tokens."""
    logits_BTV = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    targets = batch.labels[:, 1:].flatten()
    total = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
    )
    return total, int((targets != IGNORED).sum())


def _rate(train: TrainConfig, done: float) -> float:
    if train.schedule not in ("constant", "cosine") or train.warmup or train.trunk_lr or train.prox:
        raise ValueError(
            "the reference knows train.schedule=constant and cosine, without train.warmup, "
            f"train.trunk_lr and train.prox; got schedule={train.schedule}, "
            f"warmup={train.warmup:g}, trunk_lr={train.trunk_lr:g}, prox={train.prox:g}"
        )
    return train.lr * (0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1.0)
