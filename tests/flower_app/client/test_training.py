"""Rows 9, 10, 12: what counts in the loss, when dropout acts, and that evaluation is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conf.schema import TrainConfig
from flower_app.client import streamed
from flower_app.client.ends import token_loss
from flower_app.client.step import Outcome
from flower_app.data.client import Batch
from models import split
from simulations.equality.local_link import LocalLink
from strategies.errors import TrunkError
from tests.strategies.helpers import (
    CUT,
    engine_for,
    largest_difference,
    place,
    random_batch,
    random_steps,
    tiny_model,
    train_split,
    twin,
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """See `one_thread`."""


def evaluate_split(model: torch.nn.Module, batches: list[Batch], **train: Any) -> Outcome:
    parts = split(model, CUT)  # type: ignore[arg-type]
    engine = engine_for(parts.trunk, TrainConfig(**train))
    engine.open_round(0, 1, training=False)
    link = LocalLink(engine.open("a"))
    return streamed.evaluate(parts.bottom, parts.top, link, batches, TrainConfig(**train))


def test_the_loss_counts_exactly_the_labels_that_are_learned() -> None:
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[-100, -100, 3, 4, -100], [1, 2, -100, -100, -100]])

    total, tokens = token_loss(logits, labels)

    # Position t predicts t + 1: the label at position 0 is never predicted.
    picked = [(0, 1, 3), (0, 2, 4), (1, 0, 2)]
    expected = sum(-F.log_softmax(logits[b, t], -1)[label] for b, t, label in picked)
    assert tokens == 3
    assert float(total) == pytest.approx(float(expected), abs=1e-5)


def test_prompts_and_padding_do_not_train() -> None:
    """Other ids under the mask and other prompt labels must not matter to what is learned."""
    model = tiny_model()
    batch = random_batch(3, padding="right")
    labels = batch.labels.clone()
    labels[:, :4] = -100
    noisy = torch.where(batch.attention_mask.bool(), batch.input_ids, 77)
    one = Batch(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    two = Batch(input_ids=noisy, attention_mask=batch.attention_mask, labels=labels)
    train = TrainConfig(optimizer="sgd", lr=0.3)
    first, second, unmasked = twin(model), twin(model), twin(model)

    outcome = train_split(first, [[one]], train)
    train_split(second, [[two]], train)
    train_split(unmasked, [[batch]], train)

    assert outcome.tokens == int((labels != -100).sum())
    embedding = "model.embed_tokens.weight"
    left, right = dict(first.named_parameters()), dict(second.named_parameters())
    assert all(torch.equal(left[n], right[n]) for n in left if n != embedding)
    assert largest_difference(first, unmasked) > 1e-3


@pytest.mark.parametrize("padding", ["", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluation_equals_the_unsplit_models(family: str, padding: str) -> None:
    model = tiny_model(family)
    batches = [random_batch(seed, 2 + seed, 9 + seed, padding) for seed in range(3)]

    outcome = evaluate_split(model, batches)

    total, tokens = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        targets = batch.labels[:, 1:].flatten()
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum"))
        tokens += int((targets != -100).sum())
    assert outcome.tokens == tokens
    assert outcome.loss == pytest.approx(total / tokens, abs=1e-5)


def test_a_failing_batch_ends_the_evaluation() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))

    with pytest.raises(ValueError, match="batch 0 has a loss of nan"):
        evaluate_split(model, [random_batch(0)])
    with pytest.raises(ValueError, match="no held-out token"):
        evaluate_split(tiny_model(), [])


@pytest.mark.parametrize("part", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_acts_in_training_only(part: str) -> None:
    model = tiny_model("gpt2", **{part: 0.5})
    batches = [random_batch(0)]
    train = TrainConfig(optimizer="sgd", lr=0.0001)

    dropped = train_split(twin(model), [batches], train).losses
    plain = train_split(tiny_model("gpt2"), [batches], train).losses

    assert abs(dropped[0] - plain[0]) > 5e-5  # rounding is below 1e-6
    model.train()
    assert evaluate_split(model, batches).loss == evaluate_split(model, batches).loss
    assert evaluate_split(model, batches).loss == pytest.approx(plain[0], abs=1e-5)


@pytest.mark.parametrize("where", range(3))
def test_dropout_acts_in_every_part(where: int) -> None:
    """With dropout in one part only, training differs from training without."""
    model = tiny_model("gpt2")
    parts = split(model, CUT)
    for module in list(parts)[where].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    engine = engine_for(parts.trunk, TrainConfig())
    engine.open_round(1, 1, training=True)
    link = LocalLink(engine.open("a", client="a", steps=1))
    steps = [[random_batch(0)]]

    outcome = streamed.train(parts.bottom, parts.top, link, steps, 1, TrainConfig(), place("a"))

    plain = train_split(tiny_model("gpt2"), steps, TrainConfig()).losses
    assert abs(outcome.losses[0] - plain[0]) > 1e-3


def test_the_process_generator_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    train_split(tiny_model("gpt2", resid_pdrop=0.2), random_steps(2, seed=0), TrainConfig())

    assert torch.equal(torch.rand(3), expected)


def test_a_step_without_anything_to_learn_is_refused() -> None:
    batch = random_batch(0)
    empty = Batch(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=torch.full_like(batch.labels, -100),
    )

    with pytest.raises(ValueError, match="step 0 has no token that counts"):
        train_split(tiny_model(), [[empty]], TrainConfig())


def test_a_loss_that_explodes_stops_both_sides_in_words() -> None:
    model = tiny_model()
    before = twin(model)

    words = "of step 1 (is (nan|inf)|holds values that are not finite); lower train.lr"
    with pytest.raises(TrunkError, match=words):
        train_split(model, random_steps(3, seed=0), TrainConfig(optimizer="sgd", lr=1e30, clip=0))

    trunk, untouched = split(model, CUT).trunk, split(before, CUT).trunk
    assert largest_difference(trunk, untouched) == 0
