"""The claims of `graft parity --all`: what each compares, and within what tolerance."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from conf.schema import (
    AggregationConfig,
    Config,
    LinkConfig,
    TrainConfig,
)
from models import Cut, split
from models.verify import PADDINGS, TOLERANCE, compare, example
from simulations.equality.federation import (
    Client,
    Cohort,
    Federation,
    Gap,
    Reference,
    exact_lora,
    fed_prox_round,
    largest_difference,
    side_by_side,
    unsplit,
)
from simulations.equality.inprocess import read_tensors, run_app
from simulations.equality.parity import all_cuts, count_blocks
from simulations.equality.reference import (
    centralised_round,
    fed_avg_round,
    plain_optimizer,
    train_whole,
)
from simulations.equality.subjects import Subject
from simulations.equality.trial import (
    Claim,
    NotTriedError,
    app_config,
    draw_steps,
    train_config,
    unequal_cohorts,
)

CUTS = (Cut(1, 1), Cut(2, 1), Cut(1, 2))
"""Of three clients with cuts of their own."""

# ---- what is compared -------------------------------------------------------------------------


def split_is_unsplit(subject: Subject, claim: Claim) -> Gap:
    """Logits and every gradient, at a few cuts and every padding."""
    blocks = count_blocks(subject.model)
    cuts = all_cuts(blocks)
    if blocks > 4:
        cuts = [Cut(1, 1), Cut(blocks // 2, blocks // 4)]
    worst = 0.0
    for cut in cuts:
        parts = split(subject.model, cut, allow_untested=subject.allow_untested)
        for padding in PADDINGS:
            found = compare(subject.model, parts, *example(subject.model.config, padding))
            worst = max(worst, found.logits, found.gradient)
    return Gap(worst)


def one_client(subject: Subject, claim: Claim) -> Gap:
    """One client's steps, and the same steps of the unsplit model."""

    def alone(whole: PreTrainedModel, cohort: Cohort, *rest: Any) -> None:
        train_whole(whole, cohort[0], *rest)

    steps = 3 if subject.large else 6
    cohort = [draw_steps(subject, steps, seed=1, accumulate=2, padding="left")]
    return _compared(subject, claim, [cohort], alone, accumulate=2)


def fed_avg(
    subject: Subject, claim: Claim, *, mixed: bool = False, reference: Reference = fed_avg_round
) -> Gap:
    """Three clients of unequal steps and batches, two rounds; `mixed`: of three cuts."""
    if mixed and count_blocks(subject.model) < 4:
        raise NotTriedError(f"cuts {CUTS} need 4 blocks, it has {count_blocks(subject.model)}")
    clients = [Client(cut, 4) for cut in CUTS] if mixed else None
    cohorts = unequal_cohorts(subject)
    return _compared(subject, claim, cohorts, reference, clients, accumulate=2)


def centralised(subject: Subject, claim: Claim) -> Gap:
    """Three clients of unequal batches, lengths and paddings, two rounds; one optimizer for all."""
    cohorts = [
        [
            draw_steps(subject, subject.steps, seed=17 * number + 1000 * client, padding=padding)
            for client, padding in enumerate(("left", "right", "none"))
        ]
        for number in (1, 2)
    ]
    config = train_config(subject, claim)
    whole = unsplit(subject.model, config)
    optimizer = plain_optimizer(whole, config.train)

    def reference(
        model: PreTrainedModel, cohort: Cohort, train: TrainConfig, number: int, rounds: int
    ) -> None:
        centralised_round(model, cohort, train, number, rounds, optimizer=optimizer)

    federation = _federation(subject, config)
    return side_by_side(federation, whole, config.train, cohorts, reference)


def exact_mean(subject: Subject, claim: Claim) -> Gap:
    """Clients of three ranks and, where there are blocks for it, three cuts."""
    cuts = CUTS if count_blocks(subject.model) >= 4 else (subject.cut,) * 3
    clients = [Client(cut, rank) for cut, rank in zip(cuts, (4, 2, 6), strict=True)]
    config = replace(
        train_config(subject, claim, accumulate=2), aggregation=AggregationConfig(lora="exact")
    )
    federation = _federation(subject, config, clients)
    return exact_lora(federation, unequal_cohorts(subject), config.lora.alpha)


def transports(subject: Subject, claim: Claim) -> Gap:
    """Both apps whole, once with a stream to the trunk, once with nothing but messages."""
    links = [LinkConfig(transport=transport) for transport in ("stream", "messages")]
    clients = 1 if claim.train["strategy"] == "splitfed-v2" else 2 if subject.large else 3
    return _runs(subject, claim, links, clients)


def windows(subject: Subject, claim: Claim) -> Gap:
    """Both apps whole, once with one micro-batch under way at a time, once with several."""
    links = [LinkConfig(window=window) for window in (1, 4)]
    return _runs(subject, claim, links, 2 if subject.large else 3, micros=5)


def _runs(
    subject: Subject, claim: Claim, links: Sequence[LinkConfig], clients: int, micros: int = 2
) -> Gap:
    """Two runs of the apps that differ in their links."""
    saved = []
    with tempfile.TemporaryDirectory(prefix="graft-parity-") as folder:
        for link in links:
            config = app_config(subject, claim, link, clients, folder, micros)
            saved.append(run_app(config, clients))
    first = read_tensors(subject.folder)
    # lora_B starts at zero.
    moved = [t for name, t in saved[0].items() if ".lora_B." in name]
    moved += [t - first[name] for name, t in saved[0].items() if name in first]
    return Gap(largest_difference(*saved), max(float(t.abs().max()) for t in moved))


def _compared(
    subject: Subject,
    claim: Claim,
    cohorts: Sequence[Cohort],
    reference: Reference,
    clients: Sequence[Client] | None = None,
    **train: Any,
) -> Gap:
    config = train_config(subject, claim, rounds=len(cohorts), **train)
    clients = clients or [Client(subject.cut, config.lora.rank)] * len(cohorts[0])
    federation = _federation(subject, config, clients)
    whole = unsplit(subject.model, config)
    return side_by_side(federation, whole, config.train, cohorts, reference)


def _federation(
    subject: Subject, config: Config, clients: Sequence[Client] | None = None
) -> Federation:
    clients = clients or [Client(subject.cut, config.lora.rank)] * 3
    return Federation(subject.model, config, clients, allow_untested=subject.allow_untested)


# ---- the claims -------------------------------------------------------------------------------

_SGD, _ADAMW, _MERGED_ADAMW, _NONE = 1e-5, 1e-4, 2e-4, 0.0
"""Largest differences of weights. AdamW divides by the root of the second moment."""

_FEDAVG = "splitfed-v1 = FedAvg of the unsplit model"
_PROX = "splitfed-v1, prox = FedProx of the unsplit model"
_CUTS = "splitfed-v1, three cuts = FedAvg of the unsplit"
_MERGED = "merged, sync=step = centralised training"
_FROZEN = "merged, sync=round, ends frozen = centralised"
_EXACT = "exact LoRA: effective weights = clients' mean"
_STEP: dict[str, Any] = {"strategy": "merged", "sync": "step"}
_mixed = partial(fed_avg, mixed=True)
_prox = partial(fed_avg, reference=fed_prox_round)


def _transports(text: str, **train: Any) -> Claim:
    return Claim(f"stream = messages: {text}", transports, _NONE, "all", "adamw", train)


def _windows(text: str, **train: Any) -> Claim:
    return Claim(f"link.window 4 = 1: {text}", windows, _NONE, "all", "adamw", train)


CLAIMS: tuple[Claim, ...] = (
    Claim("split = unsplit: logits, every gradient", split_is_unsplit, TOLERANCE),
    Claim("one client = unsplit training", one_client, _SGD, "all", "sgd"),
    Claim("one client = unsplit training", one_client, _ADAMW, "all", "adamw"),
    Claim(_FEDAVG, fed_avg, _SGD, "all", "sgd"),
    Claim(_FEDAVG, fed_avg, _ADAMW, "all", "adamw"),
    Claim(_FEDAVG, fed_avg, _ADAMW, "LoRA", "adamw"),
    Claim(_PROX, _prox, _SGD, "all", "sgd", {"prox": 5.0}),
    Claim(_CUTS, _mixed, _SGD, "all", "sgd"),
    Claim(_CUTS, _mixed, _ADAMW, "all", "adamw"),
    Claim(_CUTS, _mixed, _ADAMW, "LoRA", "adamw"),
    Claim(_MERGED, centralised, _SGD, "all", "sgd", _STEP),
    Claim(_MERGED, centralised, _MERGED_ADAMW, "all", "adamw", _STEP),
    Claim(_MERGED, centralised, _SGD, "LoRA", "sgd", _STEP),
    Claim(_FROZEN, centralised, _SGD, "trunk", "sgd", {"strategy": "merged"}),
    Claim(_EXACT, exact_mean, 1e-6, "LoRA", "adamw"),
    _transports("splitfed-v1", strategy="splitfed-v1"),
    _transports("splitfed-v2, one client", strategy="splitfed-v2"),
    _transports("merged, sync=round", strategy="merged"),
    _transports("merged, sync=step", **_STEP),
    _windows("splitfed-v1", strategy="splitfed-v1"),
    _windows("splitfed-v2", strategy="splitfed-v2", turns="ordered"),
    _windows("merged, sync=round", strategy="merged"),
    _windows("merged, sync=step", **_STEP),
    # A resumed run, once there are checkpoints: Claim("resumed = not stopped", resumed, 0.0, "all")
)
"""Every row of the table; a claim is added here."""
