"""The cipher reads signs by their order alone: no model, no vector of a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flower_app.data.client import load_tokenizer
from simulations.audit.attack import NotApplicable, find_attacks
from simulations.audit.attacks import cipher
from simulations.audit.attacks.cipher import Language, Signs, read
from simulations.audit.calibrate import attack_all, calibrate_all
from simulations.audit.observation import CLIENT, PUBLIC, Crossed
from simulations.audit.recording import Recording
from simulations.audit.texts import public_ids
from tests.simulations.audit.conftest import small

TEXTS = 60
"""Of 64 tokens, that are read."""


@pytest.fixture(scope="module")
def public() -> list[list[int]]:
    return public_ids(load_tokenizer(small().model), 64, 600, 259)


def recovered(public: list[list[int]], heard_BT: Tensor, noise: float) -> float:
    """Of texts as vectors that nobody knows, the share that is read."""
    generator = torch.Generator().manual_seed(0)
    vectors_VD = torch.randn(259, 48, generator=generator)
    h1_BTD = vectors_VD[heard_BT] + noise * torch.randn(*heard_BT.shape, 48, generator=generator)
    mask_BT = torch.ones_like(heard_BT)
    mask_BT[0, 40:] = 0
    h1_BTD[0, 40:] = 0.0
    rng, language = np.random.default_rng(0), Language(public[TEXTS:])
    signs = Signs([Crossed(step=0, micro=0, h1_BTD=h1_BTD, mask_BT=mask_BT)], rng)
    ids_BT = language.ids_S[read(signs, language, rng)[signs.of(h1_BTD)]]
    return float((ids_BT == heard_BT.numpy())[mask_BT.bool().numpy()].mean())


def test_texts_of_unknown_vectors_are_read(
    public: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token has a vector that nobody knows, and noise; out of order they are not read."""
    monkeypatch.setattr(cipher, "READINGS", 4)
    monkeypatch.setattr(cipher, "SIGNS", 96)
    texts_BT = torch.tensor(public[:TEXTS])
    assert recovered(public, texts_BT, 0.3) > 0.8
    assert recovered(public, texts_BT, 0.0) > 0.8, "fewer different rows than signs"
    order = torch.from_numpy(np.random.default_rng(1).permutation(texts_BT.numel()))
    assert recovered(public, texts_BT.flatten()[order].view_as(texts_BT), 0.3) < 0.3


def test_the_reading_counts_whose_equal_tokens_look_alike() -> None:
    h1_BTD = torch.tensor([[[0.0, 1.0], [5.0, 1.1], [0.1, 0.9], [5.1, 1.0]]] * 8)
    h1_BTD = h1_BTD + 0.01 * torch.randn(h1_BTD.shape, generator=torch.Generator().manual_seed(0))
    signs = Signs([Crossed(step=0, micro=0, h1_BTD=h1_BTD)], np.random.default_rng(0))
    right_N, wrong_N = np.array([0, 1, 0, 1] * 8), np.array([0, 0, 1, 1] * 8)
    assert signs.alike(right_N) > signs.alike(wrong_N) + 10
    assert signs.alike(1 - right_N) == pytest.approx(signs.alike(right_N)), "names are not compared"


def test_a_large_vocabulary_is_refused() -> None:
    with pytest.raises(NotApplicable, match="600 tokens, .* of 512 at most"):
        Language([list(range(600))])


def test_all_of_a_round_is_heard_and_nothing_by_a_client(recording: Recording) -> None:
    client = recording.clients[0]
    assert [each.step for each in client.observation.heard] == [0, 1, 2]
    last, (crossed,) = client.observation.heard[-1], client.observation.crossed
    assert last.h1_BTD is not None
    assert crossed.h1_BTD is not None
    assert torch.equal(last.h1_BTD[: len(crossed.h1_BTD)], crossed.h1_BTD)
    assert len(last.h1_BTD) == 4
    assert not recording.seen_by(CLIENT)[0].observation.heard
    (attack,) = find_attacks(["cipher"])
    with pytest.raises(NotApplicable, match="no h1"):
        nothing = Recording(recording.config, [recording.seen_by(CLIENT)[0]], parts=recording.parts)
        attack_all(attack, nothing, PUBLIC, 0)


def test_a_large_vocabulary_is_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cipher, "load_tokenizer", lambda model: range(49152))
    told, refused = calibrate_all(find_attacks(["cipher"]), small(), say=pytest.fail)
    assert not told
    assert "49152 tokens" in refused["cipher"]
