"""What poisoned updates do to training, and what robust aggregation saves of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conf.schema import AggregationConfig, Config, CutConfig, TrainConfig, TuningConfig
from flower_app.data.client import Batch, batches
from models import Cut, client_state, load_trainable_state
from models.whole import build_scratch
from simulations.disturb.poison import ATTACKS, TARGET, TRIGGER, Poison, with_trigger
from simulations.equality.federation import Client, Federation, unsplit
from simulations.equality.reference import heldout_loss
from simulations.study.settings import Study, cohort_of, load_clients, scratch
from strategies.aggregate.state import Contribution
from strategies.rounds.answers import join

METHODS = ("none", "median", "trimmed-mean", "krum", "multi-krum", "norm-bound")
SIZE = Study(clients=7, rounds=4, local_steps=10, hidden=32, context=64, max_examples=80)


def study_poison(
    attacks: Sequence[str] = tuple(ATTACKS),
    methods: Sequence[str] = METHODS,
    *,
    seed: int = 0,
    poisoned: int = 2,
    division: str = "iid",
    size: Study = SIZE,
) -> list[dict[str, Any]]:
    """Train under each attack with each method; a row for each.

    Parameters
    ----------
    attacks, methods : sequence of str
        Of `ATTACKS` and `METHODS`.
    poisoned : int
        Clients that attack: the first ones. `aggregation.byzantine` is so many, too.
    division : str
        How text is divided, as `data.partitioner`.
    """
    return [
        {"attack": attack, "robust": method, "seed": seed}
        | _train(ATTACKS[attack], method, seed, poisoned, division, size)
        for attack in attacks
        for method in methods
    ]


def _train(
    poison: Poison, method: str, seed: int, poisoned: int, division: str, size: Study
) -> dict[str, Any]:
    """Held-out loss (nats per byte), how often the trigger works, and who stood out how often."""
    config = Config(
        seed=seed,
        cut=CutConfig(bottom=size.cut[0], top=size.cut[1]),
        tuning=TuningConfig(bottom="full", trunk="full", top="full"),
        train=TrainConfig(rounds=size.rounds, local_steps=size.local_steps, lr=4e-3),
        aggregation=AggregationConfig(robust=method, byzantine=poisoned),
    )
    model = build_scratch(scratch(size), seed=seed)
    clients = load_clients(size, division, seed)
    cut = Cut(bottom=size.cut[0], top=size.cut[1])
    federation = Federation(model, config, [Client(cut, config.lora.rank)] * size.clients)
    stood_out: dict[str, int] = {}
    for number in range(1, size.rounds + 1):
        start = _copied({**client_state(*federation.ends(0)), **federation.tensors()})
        cohort = cohort_of(size, clients, seed, number)
        cohort = [poison.steps(s) if c < poisoned else s for c, s in enumerate(cohort)]
        _, answers = federation.learn(cohort, number)
        given = [
            one if c >= poisoned else _sent(one, poison, start)
            for c, one in enumerate(join(answers, federation.replicas))
        ]
        for client in federation.joint.update(number, given).anomalies:
            stood_out[client] = stood_out.get(client, 0) + 1
    whole = unsplit(model, config)
    load_trainable_state(whole, federation.tensors())
    heldout = [b for c in clients for b in batches(c.heldout, 32, pad_id=0)]
    loss = heldout_loss(whole, heldout)[0]
    return {"loss": loss, "backdoor": triggered(whole, heldout), "stood_out": stood_out}


def triggered(model: PreTrainedModel, heldout: Sequence[Batch]) -> float:
    """How often the target is what the model expects most after the trigger."""
    hits = tries = 0
    for batch in map(with_trigger, heldout):
        with torch.no_grad():
            logits_BTV = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        there = batch.input_ids == TRIGGER
        hits += int((logits_BTV.argmax(-1)[there] == TARGET).sum())
        tries += int(there.sum())
    return hits / tries


def _sent(one: Contribution, poison: Poison, start: Mapping[str, Tensor]) -> Contribution:
    return replace(one, state=poison.state(start, one.state))


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}
