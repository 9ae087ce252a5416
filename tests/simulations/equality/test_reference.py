"""The plain PyTorch reference is itself right: against loops written out, and against itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from conf.schema import TrainConfig
from flower_app.data.client import Batch
from simulations.equality.reference import (
    centralised_round,
    concatenated,
    fed_avg_round,
    heldout_loss,
    plain_optimizer,
    train_whole,
)
from tests.strategies.helpers import (
    largest_difference,
    random_batch,
    random_steps,
    tiny_model,
    twin,
)

SGD = TrainConfig(optimizer="sgd", lr=0.3, clip=0.0)


def mean_loss(model: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    """Mean over the tokens that count, sequence by sequence, without padding."""
    totals, count = torch.zeros(()), 0
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            own = ids[mask.bool()]
            logits = model(own[None]).logits[0, :-1]
            totals = totals + F.cross_entropy(logits, own[1:], reduction="sum")
            count += len(own) - 1
    return totals / count


def test_a_step_is_gradient_descent_on_the_mean_over_tokens() -> None:
    model, steps = tiny_model(), random_steps(1, seed=3, accumulate=2)
    by_hand = twin(model)

    losses, tokens = train_whole(model, steps, SGD)
    loss = mean_loss(by_hand, steps[0])
    loss.backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= SGD.lr * parameter.grad

    assert losses == pytest.approx([float(loss.detach())], abs=1e-5)
    assert tokens == sum(batch.tokens for batch in steps[0])
    assert largest_difference(model, by_hand) < 1e-5


def test_concatenation_leaves_the_loss_alone() -> None:
    model = tiny_model()
    batches = [random_batch(1, 2, 6, "right"), random_batch(2, 3, 10), random_batch(3, 1, 8)]

    one = concatenated(batches)

    assert one.input_ids.shape == (6, 10)
    assert one.tokens == sum(batch.tokens for batch in batches)
    together, tokens = heldout_loss(model, [one])
    assert together == pytest.approx(heldout_loss(model, batches)[0], abs=1e-6)
    assert together == pytest.approx(float(mean_loss(model, batches).detach()), abs=1e-5)
    assert tokens == one.tokens


def test_one_local_step_of_sgd_is_the_same_in_fedavg_and_centralised() -> None:
    """Averaging by tokens one step of each client is one step on the mean over all tokens."""
    cohort = [random_steps(1, seed=10 * client) for client in range(3)]
    model = tiny_model()
    central = twin(model)
    before = twin(model)

    fed_avg_round(model, cohort, SGD, 1, 1)
    centralised_round(central, cohort, SGD, 1, 1, optimizer=plain_optimizer(central, SGD))

    assert largest_difference(model, central) < 1e-5
    assert largest_difference(model, before) > 1e-3


def test_centralised_takes_who_has_a_step_and_keeps_its_optimizer() -> None:
    train = TrainConfig(lr=1e-2, rounds=2)
    cohort = [random_steps(2, seed=0), random_steps(1, seed=5)]
    model = tiny_model()
    at_once = twin(model)
    optimizer = plain_optimizer(model, train)

    for number in (1, 2):
        losses, tokens = centralised_round(model, cohort, train, number, 2, optimizer=optimizer)
    joined = [[concatenated([*cohort[0][0], *cohort[1][0]])], cohort[0][1]] * 2
    train_whole(at_once, joined, train)

    assert len(losses) == 2
    assert tokens == sum(batch.tokens for steps in cohort for step in steps for batch in step)
    assert largest_difference(model, at_once) < 1e-6


def test_cosine_falls_over_all_rounds() -> None:
    model, train = tiny_model(), TrainConfig(lr=1e-2, schedule="cosine", rounds=2)
    optimizer = plain_optimizer(model, train)

    train_whole(model, random_steps(2, seed=0), train, 2, 2, optimizer=optimizer)

    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        1e-2 * 0.5 * (1 + math.cos(math.pi * 0.75))
    )


@pytest.mark.parametrize(
    "changes", [{"schedule": "linear"}, {"warmup": 0.1}, {"trunk_lr": 1e-4}, {"prox": 0.1}]
)
def test_settings_that_the_reference_does_not_know_are_refused(changes: dict[str, object]) -> None:
    train = TrainConfig(**changes)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="the reference knows"):
        train_whole(tiny_model(), random_steps(1, seed=0), train)
