"""A client's examples, their held-out share, and the batches of a round."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest
import torch

from conf.load import load_config
from conf.schema import DataConfig, TrainConfig
from flower_app.data.client import (
    IGNORED,
    Batch,
    Example,
    batches,
    load_client_data,
    num_steps,
    split_heldout,
    steps,
)
from tests.flower_app.data.helpers import (
    CHAT,
    byte_tokenizer,
    contents,
    decoded,
    files_config,
    write_jsonl,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))


def example(*ids: int) -> Example:
    tensor = torch.tensor(ids)
    return Example(tensor, tensor.clone())


def test_the_demo_gives_both_clients_text_and_the_same_on_every_call() -> None:
    config = load_config("demo")
    tokenizer = byte_tokenizer()
    clients = [
        load_client_data(config.data, tokenizer, partition=k, partitions=2, seed=0)
        for k in (0, 1, 0)
    ]
    for client in clients:
        tokens = sum(len(e.input_ids) for e in client.train + client.heldout)
        assert tokens > 100_000
        assert 0.09 < len(client.heldout) / (len(client.train) + len(client.heldout)) < 0.11
        assert all(2 <= len(e.input_ids) <= 128 for e in client.train)
    assert contents(clients[0].train) == contents(clients[2].train)
    assert contents(clients[0].heldout) == contents(clients[2].heldout)
    assert contents(clients[0].train) != contents(clients[1].train)
    assert not set(contents(clients[0].heldout)) & set(contents(clients[0].train))


def test_all_documents_reach_exactly_one_client(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"Nummer {i} ü"} for i in range(41)])
    tokenizer = byte_tokenizer()
    texts = []
    for k in range(3):
        client = load_client_data(files_config(path), tokenizer, partition=k, partitions=3, seed=5)
        assert client.heldout
        texts += decoded(client.train + client.heldout, tokenizer)
    assert sorted(texts) == sorted(f"Nummer {i} ü" for i in range(41))


def test_prompts_and_chats_reach_the_examples_masked(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHAT)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": "ab", "a": "c", "m": talk}] * 4)
    for config, learned in (
        (files_config(path, prompt_column="q", completion_column="a"), "c"),
        (files_config(path, messages_column="m"), "bc\n"),
    ):
        client = load_client_data(config, tokenizer, partition=0, partitions=2, seed=0)
        labels = client.train[0].labels
        assert tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True) == learned


def test_a_node_with_its_own_file_is_not_divided(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": f"text {i}"} for i in range(10)])
    tokenizer = byte_tokenizer()
    client = load_client_data(
        DataConfig(partitioner="natural"),
        tokenizer,
        partition=0,
        partitions=1,
        data_path=str(path),
        seed=0,
    )
    assert len(client.train) + len(client.heldout) == 10
    assert "own.jsonl" in client.name


def test_empty_texts_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["", "  ", "one", "two", None]
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    with caplog.at_level(logging.WARNING):
        client = load_client_data(
            files_config(path), byte_tokenizer(), partition=0, partitions=1, seed=0
        )
    assert (client.documents, client.skipped) == (2, 3)
    assert "3 documents skipped" in caplog.text


def test_a_client_without_an_example_is_refused_in_words(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": " ", "q": "a long prompt", "a": "x"}] * 4)
    for values, column in (
        ({}, "text"),
        ({"prompt_column": "q", "completion_column": "a", "context": 8}, "a"),
    ):
        with pytest.raises(ValueError, match=rf"partition 2 of 2.*2 documents.*column '{column}'"):
            load_client_data(
                files_config(path, **values), byte_tokenizer(), partition=1, partitions=2, seed=0
            )


def test_max_examples_counts_all_of_a_client(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "x" * 40}] * 30)
    config = files_config(path, context=16, max_examples=20, heldout=0.2)
    client = load_client_data(config, byte_tokenizer(), partition=0, partitions=1, seed=0)
    assert len(client.train) + len(client.heldout) == 20


def test_refused_length_names_the_document(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "x" * 40}])
    with pytest.raises(ValueError, match=r"document 0 of .*d\.jsonl.*41 tokens"):
        load_client_data(
            files_config(path, context=16, overlong="refuse"),
            byte_tokenizer(),
            partition=0,
            partitions=1,
            seed=0,
        )


def documents(*sizes: int) -> list[list[Example]]:
    return [[example(d, window) for window in range(size)] for d, size in enumerate(sizes)]


def owners(examples: list[Example]) -> set[int]:
    return {int(e.input_ids[0]) for e in examples}


def test_whole_documents_are_held_out() -> None:
    train, heldout = split_heldout(documents(*[2] * 30), 0.2, seed=0, partition=0)
    assert len(heldout) == 12
    assert not owners(train) & owners(heldout)
    assert len(train) + len(heldout) == 60


def test_the_held_out_share_depends_on_seed_and_partition() -> None:
    splits = [
        contents(split_heldout(documents(*[1] * 50), 0.2, seed=seed, partition=partition)[1])
        for seed, partition in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert splits[0] == splits[1]
    assert splits[0] not in splits[2:]


def test_windows_are_held_out_of_a_single_long_document() -> None:
    train, heldout = split_heldout(documents(100), 0.1, seed=0, partition=0)
    assert len(heldout) == 10
    assert sorted(contents(train + heldout)) == sorted(contents(documents(100)[0]))


@pytest.mark.parametrize(
    ("sizes", "share", "held"),
    [((2,), 0.01, 1), ((1, 1), 0.1, 1), ((1,), 0.5, 0), ((5,), 0.0, 0), ((1, 1, 1), 0.5, 2)],
)
def test_few_examples_still_train(sizes: tuple[int, ...], share: float, held: int) -> None:
    train, heldout = split_heldout(documents(*sizes), share, seed=0, partition=0)
    assert len(heldout) == held
    assert len(train) == sum(sizes) - held > 0


def test_a_batch_is_padded_on_the_right_and_masked() -> None:
    short = Example(torch.tensor([5, 6]), torch.tensor([IGNORED, 6]))
    (batch,) = batches([short, example(7, 8, 9)], 4, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED], [7, 8, 9]]
    assert batch.tokens == 3  # 6, then 8 and 9: the first token of a row is predicted from nothing
    tensors = (batch.input_ids, batch.attention_mask, batch.labels)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_a_token_that_equals_the_padding_still_counts() -> None:
    (batch,) = batches([example(5, 1), example(5, 6, 7)], 2, pad_id=1)
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.tokens == 3


def firsts(found: list[Batch]) -> list[int]:
    return [int(token) for batch in found for token in batch.input_ids[:, 0]]


def test_an_epoch_has_every_example_once() -> None:
    examples = [example(i, i) for i in range(10)]
    ordered = list(batches(examples, 4, pad_id=0))
    assert [len(batch.input_ids) for batch in ordered] == [4, 4, 2]
    assert firsts(ordered) == list(range(10))
    shuffled = firsts(list(batches(examples, 4, pad_id=0, generator=torch.Generator())))
    assert shuffled != list(range(10))
    assert sorted(shuffled) == list(range(10))
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        next(batches(examples, 0, pad_id=0))


def test_steps_are_exact_and_cycle_reshuffled_epochs() -> None:
    examples = [example(i, i) for i in range(10)]

    def run(count: int, seed: int = 0) -> list[list[Batch]]:
        generator = torch.Generator().manual_seed(seed)
        return list(
            steps(examples, batch_size=3, accumulate=2, steps=count, pad_id=0, generator=generator)
        )

    found = run(5)
    assert [len(step) for step in found] == [2, 2, 2, 2, 2]
    epochs = [firsts([b for step in found[i : i + 2] for b in step]) for i in (0, 2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert [firsts(step) for step in run(5)] == [firsts(step) for step in found]
    assert [firsts(step) for step in run(3)] == [firsts(step) for step in found[:3]]
    assert [firsts(step) for step in run(5, seed=1)] != [firsts(step) for step in found]
    assert run(0) == []


def test_a_step_does_not_reach_into_the_next_epoch() -> None:
    examples = [example(i, i) for i in range(5)]
    found = list(steps(examples, batch_size=1, accumulate=2, steps=4, pad_id=0))
    assert [firsts(step) for step in found] == [[0, 1], [2, 3], [4], [0, 1]]


def test_no_examples_give_no_endless_loop() -> None:
    with pytest.raises(ValueError, match="no steps from 0 examples"):
        next(steps([], batch_size=1, accumulate=1, steps=1, pad_id=0))


@pytest.mark.parametrize(
    ("examples", "train", "expected"),
    [
        (10, TrainConfig(local_steps=7), 7),
        (10, TrainConfig(batch_size=4), 3),
        (10, TrainConfig(batch_size=4, accumulate=2, local_epochs=3), 6),
        (1, TrainConfig(batch_size=4, accumulate=8), 1),
    ],
)
def test_the_number_of_steps(examples: int, train: TrainConfig, expected: int) -> None:
    assert num_steps(examples, train) == expected
    made = [example(i, i) for i in range(examples)]
    whole = steps(
        made, batch_size=train.batch_size, accumulate=train.accumulate, steps=expected, pad_id=0
    )
    if not train.local_steps:
        assert len(firsts([b for step in whole for b in step])) == train.local_epochs * examples
