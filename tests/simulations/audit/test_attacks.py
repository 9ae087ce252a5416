"""Each attack finds what is there to be found, and does not see the truth that it is scored by."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import Config
from flower_app.data.client import IGNORED, Batch
from simulations.audit.attack import NotApplicable, Scores, find_attacks
from simulations.audit.attacks import search
from simulations.audit.attacks.labels import match
from simulations.audit.calibrate import attack_all
from simulations.audit.observation import CLIENT, EXACT, SERVER, STALE
from simulations.audit.ranks import auc, hits_at
from simulations.audit.recording import Recording, Scope
from tests.simulations.audit.conftest import record, small


def attack(name: str, recording: Recording, *, who: str = SERVER, shuffled: bool = False) -> Scores:
    (one,) = find_attacks([name])
    return attack_all(one, recording, one.levels[0], 0, who=who, shuffled=shuffled)


def test_labels_follow_from_the_gradient_of_the_exact_top(recording: Recording) -> None:
    scores = attack("labels", recording)
    assert scores["labels"].value > 0.95
    assert scores["labels"].chance is not None
    assert scores["labels"].chance < 0.5


def test_labels_are_of_the_gradient_and_no_guess_of_the_model(recording: Recording) -> None:
    client = recording.clients[0]
    (crossed,) = client.observation.crossed
    _, top = recording.knowledge(client, EXACT).ends(crossed)
    assert crossed.grad_h2_BTD is not None
    other = replace(crossed, grad_h2_BTD=crossed.grad_h2_BTD.roll(1, 1))
    kept_BT = client.truth.batches[0].labels[:, 1:] >= 0
    true_BT = client.truth.batches[0].labels[:, 1:]
    hits = [
        (match(top, each)[:, :-1] == true_BT)[kept_BT].float().mean() for each in (crossed, other)
    ]
    assert hits[0] > 0.95
    assert hits[1] < 0.5


@pytest.mark.parametrize("seed", [2, 3])
def test_labels_are_read_beside_padding_as_well(seed: int, chats: Config) -> None:
    """The zeros that are decoded of it would make the system too steep to be solved."""
    config = replace(chats, seed=seed, train=replace(chats.train, lr=3e-2))
    recording = record(config, Scope(clients=1, warm=20, steps=3, sequences=4))
    (crossed,) = recording.clients[0].observation.crossed
    assert crossed.mask_BT is not None
    assert len({*crossed.mask_BT.sum(1).tolist()}) > 2
    assert attack("labels", recording)["labels"].value > 0.95


def test_a_text_that_is_solved_is_not_spoilt_while_others_are_not(chats: Config) -> None:
    config = replace(chats, seed=1, train=replace(chats.train, lr=1e-2))
    recording = record(config, Scope(clients=1, warm=40, steps=3, sequences=4))
    (labels,) = find_attacks(["labels"])
    assert attack_all(labels, recording, STALE, 0)["labels"].value > 0.95


def test_what_is_not_learned_is_no_label(recording: Recording) -> None:
    (labels,) = find_attacks(["labels"])
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    batch = Batch(ids_BT, torch.ones_like(ids_BT), torch.tensor([[IGNORED, IGNORED, 7, 8]]))
    assert labels.targets(batch).tolist() == [[IGNORED, IGNORED, 7, 8]]  # type: ignore[attr-defined]


def test_lengths_of_texts_and_prompts_are_told_to_the_token(chats: Config) -> None:
    recording = record(chats)
    scores = attack("lengths", recording)
    assert scores["length"].value == scores["prompt length"].value == 1.0
    assert scores["length"].chance is not None
    assert scores["length"].chance < 1.0
    assert attack("lengths", recording, shuffled=True)["length"].value < 0.5


def test_a_text_without_a_prompt_has_no_prompts_length(recording: Recording) -> None:
    assert attack("lengths", recording).keys() == {"length"}


def test_padding_that_crossed_as_rows_would_be_told_by_its_gradient(recording: Recording) -> None:
    """Why lengths are not padded up to a multiple: the zeros of dL/dh2 say where padding begins."""
    assert recording.parts is not None
    bottom, trunk, top = (copy.deepcopy(part).eval() for part in recording.parts)
    lengths_B = torch.tensor([5, 9, 16, 15])
    real_BT = torch.arange(16) < lengths_B[:, None]
    ids_BT = torch.randint(3, 259, (4, 16), generator=torch.Generator().manual_seed(0))
    ids_BT, labels_BT = ids_BT.where(real_BT, 0), ids_BT.where(real_BT, torch.tensor(IGNORED))
    as_rows_BT = torch.ones_like(ids_BT)
    h2_BTD = trunk(bottom(ids_BT, as_rows_BT), as_rows_BT).detach().requires_grad_()
    logits_BTV = top(h2_BTD, as_rows_BT)
    torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].transpose(1, 2), labels_BT[:, 1:], ignore_index=IGNORED
    ).backward()
    assert h2_BTD.grad is not None
    there_BT = h2_BTD.grad.norm(dim=-1) > 0
    # Nothing is predicted from the last token.
    assert (1 + (there_BT * torch.arange(1, 17)).max(1).values).equal(lengths_B)


def test_the_direction_of_a_gradient_tells_equal_labels(recording: Recording) -> None:
    assert attack("directions", recording)["AUC"].value > 0.8
    assert abs(attack("directions", recording, shuffled=True)["AUC"].value - 0.5) < 0.1


def test_rows_that_moved_are_of_tokens_that_occurred(recording: Recording) -> None:
    scores = attack("rows", recording)
    assert scores["precision"].value == 1.0
    assert scores["recall"].value > 0.9
    assert attack("rows", recording, shuffled=True)["AUC"].value < 0.7


def test_of_two_clients_each_reads_the_others_rows_as_the_server_does(recording: Recording) -> None:
    """What rounding moves is no token."""
    by_server, by_client = (attack("rows", recording, who=who) for who in (SERVER, CLIENT))
    assert by_client["precision"].value == 1.0
    assert by_client["recall"].value == by_server["recall"].value


def test_of_two_clients_each_finds_the_others_members() -> None:
    scope = Scope(clients=2, warm=0, steps=60, sequences=1, reuse=20, canaries=(2,))
    recording = record(small("train.lr=1e-2"), scope)
    assert attack("membership", recording, who=CLIENT)["AUC"].value > 0.9
    assert attack("canaries", recording, who=CLIENT)["exposure"].value > 3.0


def test_rows_need_an_embedding_that_is_trained() -> None:
    with pytest.raises(NotApplicable, match="embedding"):
        attack("rows", record(small("tuning.bottom=lora"), Scope(warm=0, steps=1, sequences=1)))


def test_with_common_steps_the_gradient_names_the_tokens_of_a_step() -> None:
    config = small("train.strategy=merged", "train.sync=step")
    recording = record(config, Scope(warm=0, steps=3, sequences=1))
    truth = recording.clients[0].truth
    ids = {i for each in truth.last for i in each.input_ids.tolist()}
    (name,) = (n for n in recording.clients[0].observation.gradients if "embed_tokens" in n)
    norms_V = recording.clients[0].observation.gradients[name].norm(dim=1)
    assert {int(i) for i in norms_V.nonzero().flatten()} <= ids
    assert attack("rows", recording)["recall"].value > 0.9


def test_members_and_secrets_that_were_learned_by_heart_are_found() -> None:
    scope = Scope(clients=1, warm=0, steps=60, sequences=1, reuse=20, canaries=(2,))
    recording = record(small("train.lr=1e-2"), scope)
    assert attack("membership", recording)["AUC"].value > 0.9
    assert attack("membership", recording, shuffled=True)["AUC"].value < 0.8
    assert attack("canaries", recording)["exposure"].value > 5.0


def test_a_secret_is_trained_on_as_often_as_it_is_planted() -> None:
    recording = record(small(), Scope(clients=1, warm=0, steps=3, sequences=1, canaries=(1, 4)))
    truth = recording.clients[0].truth
    texts = [bytes(i - 3 for i in e.input_ids.tolist() if i >= 3).decode() for e in truth.members]
    for canary in truth.canaries:
        assert texts.count(canary.before + canary.secret) == canary.repeats


def test_ranks() -> None:
    scores_N, positive_N = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([1, 0, 1, 0])
    assert auc(scores_N, positive_N) == 0.75
    assert auc(scores_N, torch.ones(4)) == 0.5
    hundred_N = torch.arange(200.0)
    assert hits_at(hundred_N, hundred_N >= 100, 0.01) == 1.0
    mixed_N = torch.from_numpy(np.random.default_rng(0).permutation(20_000)).double()
    assert hits_at(mixed_N, torch.arange(20_000) < 10_000, 0.01) == pytest.approx(0.01, abs=0.005)


def test_who_knows_the_clip_and_the_noise_reads_through_them() -> None:
    noise = ("privacy.defence=gaussian", "privacy.clip=0.05", "privacy.noise=0.05")
    recording = record(small(*noise))
    client = recording.clients[0]
    assert recording.knowledge(client, EXACT).noise == pytest.approx(0.05 * 0.05)
    simple = find_attacks(["search"])[0]
    knowledge = recording.knowledge(client, EXACT)
    blind = replace(knowledge, sent=lambda h_BTD: h_BTD, noise=0.0, rough=False)
    rng = np.random.default_rng(0)
    found = [
        simple.run(client.observation, each, client.truth, rng)["tokens"].value
        for each in (knowledge, blind)
    ]
    assert found[0] > 0.9
    assert found[1] < 0.3


def test_a_learned_inverter_reads_the_bottom_that_it_learned_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("simulations.audit.attacks.inverter.LEARNED", 100)
    recording = record(small(), Scope(clients=1, warm=0, steps=1, sequences=2))
    assert attack("inverter", recording)["tokens"].value > 0.6
    assert attack("inverter", recording, shuffled=True)["tokens"].value < 0.4


def test_a_large_vocabulary_is_searched_by_a_short_list_and_whole_where_that_fails(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    distances = search._Beam._distances

    def counted(self: Any, seen_RD: Tensor, tried_RK: Tensor) -> Tensor:
        tried.append(tried_RK.shape[1])
        return distances(self, seen_RD, tried_RK)

    monkeypatch.setattr(search, "SHORT_LIST", 24)
    monkeypatch.setattr(search._Beam, "_distances", counted)
    assert attack("search", recording)["tokens"].value > 0.99
    assert sum(count == 24 for count in tried) > 0.6 * len(tried)
    tried.clear()
    monkeypatch.setattr(
        search._Beam, "listed", lambda self, seen, *table: torch.zeros(len(seen), 24, dtype=int)
    )
    assert attack("search", recording)["tokens"].value > 0.99
    assert sum(count == 259 for count in tried) > 0.4 * len(tried)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("name", ["search", "inverter", "labels", "lengths", "membership", "rows"])
def test_on_an_accelerator_an_attack_finds_what_it_finds_here(name: str) -> None:
    there = ["runtime.client_device=cuda", "runtime.trunk_device=cuda"]
    here, far = attack(name, record(small())), attack(name, record(small(*there)))
    for metric, score in here.items():
        assert far[metric].value == pytest.approx(score.value, abs=0.05), metric
