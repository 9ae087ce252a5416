"""A client's steps are the same in every process that asks for them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from conf.load import load_config
from flower_app.client.place import Place
from flower_app.client.plan import Plan, padding_id
from flower_app.data import batches as batches_file
from flower_app.data.client import Batch
from flower_app.data.text import Example

PLACE = Place(seed=0, client="client-0", round=1, rounds=2)


def examples(count: int) -> list[Example]:
    return [Example(torch.full((4,), i + 3), torch.full((4,), i + 3)) for i in range(count)]


def plan(sizes: tuple[int, ...] = (), place: Place = PLACE, **train: int) -> Plan:
    config = load_config("demo", "train.batch_size=4 train.local_steps=0")
    config = replace(config, train=replace(config.train, **train))
    return Plan(examples(10), config, place, pad_id=0, sizes=sizes)


def seen(batches: list[Batch]) -> list[int]:
    return [int(row[0]) - 3 for batch in batches for row in batch.input_ids]


def test_a_step_can_be_asked_for_alone() -> None:
    whole = [seen(step) for step in plan(accumulate=2, local_steps=5)]

    assert [seen(plan(accumulate=2, local_steps=5)[step]) for step in range(5)] == whole
    assert len({tuple(step) for step in whole}) == 5


@pytest.mark.parametrize("sizes", [(), (6, 0, 4) * 20])
def test_a_step_by_index_collates_nothing_but_itself(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over messages every step is asked for by its number: 200 took 25,000 collations."""
    collated: list[int] = []
    usual = batches_file._collate
    monkeypatch.setattr(
        batches_file,
        "_collate",
        lambda chosen, pad_id: (collated.append(len(chosen)), usual(chosen, pad_id))[1],
    )
    asked = plan(sizes=sizes, accumulate=2, local_steps=60)

    batches = asked[54]

    assert len(collated) == len(batches) == 2
    assert collated == [len(batch.input_ids) for batch in batches]


def test_the_order_depends_on_client_and_round() -> None:
    first = seen(plan()[0])

    assert seen(plan(place=replace(PLACE, round=2))[0]) != first
    assert seen(plan(place=replace(PLACE, client="client-1"))[0]) != first


def test_drawn_sizes_take_every_example_once_in_micro_batches() -> None:
    drawn = plan(sizes=(6, 0, 4))
    steps = [seen(step) for step in drawn]

    assert drawn.count == 3
    assert [len(step) for step in steps] == [6, 0, 4]
    assert sorted(steps[0] + steps[2]) == list(range(10))
    assert [len(batch.input_ids) for batch in drawn[0]] == [4, 2]
    assert drawn[1] == []
    assert [seen(drawn[step]) for step in range(3)] == steps


def test_a_padding_token_that_the_model_does_not_embed_is_replaced() -> None:
    bottom = SimpleNamespace(config=LlamaConfig(vocab_size=257))

    found = [padding_id(bottom, SimpleNamespace(pad_token_id=own)) for own in (7, 256, 257)]

    assert found == [7, 256, 0]
