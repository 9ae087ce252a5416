"""In generation, too, nothing goes to the trunk but what the defence lets through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conf.schema import PrivacyConfig
from flower_app.client.defences.gaussian import Gaussian
from flower_app.serving.defended import DefendedTrunk
from models import split
from models.elsewhere import Crossed
from models.remote import join_remote
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits
from tests.strategies.helpers import CUT, tiny_model


class Heard:
    """A trunk that keeps what it was sent."""

    def __init__(self, trunk: Any) -> None:
        self.trunk, self.sent = trunk, list[Tensor]()

    def open(self) -> Any:
        session, sent = self.trunk.open(), self.sent
        forward = session.forward

        def heard(h_BTD: Tensor, **call: Any) -> Crossed:
            sent.append(h_BTD.clone())
            crossed: Crossed = forward(h_BTD, **call)
            return crossed

        session.forward = heard
        return session


def test_what_is_generated_with_passes_the_defence(one_thread: None) -> None:
    parts = split(tiny_model("llama"), CUT)
    plain = Heard(LocalTrunk(GenerationEngine(parts.trunk, Limits())))
    noisy = Heard(LocalTrunk(GenerationEngine(parts.trunk, Limits())))
    config = PrivacyConfig(defence="gaussian", clip=0.05, noise=0.1)
    defence = Gaussian(config, b"s" * 32)
    ids = torch.arange(1, 7)[None]
    for trunk in (plain, DefendedTrunk(noisy, defence)):
        model = join_remote(parts.bottom, parts.top, trunk)
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(noisy.sent) == len(plain.sent) == 4
    assert torch.equal(noisy.sent[0], defence.up(plain.sent[0], None, "generate/1"))
    assert not torch.equal(noisy.sent[0], plain.sent[0])
    for sent in noisy.sent:
        assert float(sent.norm(dim=-1).max()) < 0.12
    assert float(plain.sent[0].norm(dim=-1).max()) > 0.12


def test_a_token_that_comes_again_looks_unlike(one_thread: None) -> None:
    """Without a block below the cut, a generated token's h1 is its embedding: with the same noise
    each time, the frames would spell the text in a cipher of one sign for each token."""
    parts = split(tiny_model("llama"), CUT)
    heard = Heard(LocalTrunk(GenerationEngine(parts.trunk, Limits())))
    config = PrivacyConfig(defence="gaussian", clip=0.05, noise=2.0)
    trunk, token_BTD = DefendedTrunk(heard, Gaussian(config, b"s" * 32)), torch.randn(1, 1, 32)
    for session in (trunk.open(), trunk.open()):
        for length in range(3):
            session.forward(token_BTD, length=length)
        session.fork().forward(token_BTD, length=3)
    frames = {sent.numpy().tobytes() for sent in heard.sent}
    assert len(frames) == len(heard.sent) >= 6
