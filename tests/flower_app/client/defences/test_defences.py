"""A defence lies in the one place where tensors leave: what is sent, and the way back of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.load import load_config
from conf.rules import ConfigError
from conf.schema import PrivacyConfig, TrainConfig
from flower_app.client import streamed
from flower_app.client.defences._normal import key_of, normal
from flower_app.client.defences.defence import Defence, defend, say_place
from flower_app.client.defences.gaussian import Gaussian, clipped
from flower_app.client.defences.nopeek import distance_correlation
from flower_app.client.defences.registry import defences, find_defence, make_defence
from flower_app.client.ends import Ends
from flower_app.client.step import Evaluation
from models import Parts, split
from simulations.equality.local_link import LocalLink
from tests.strategies.helpers import (
    CUT,
    engine_for,
    largest_difference,
    place,
    random_batch,
    random_steps,
    tiny_model,
)

SECRET = b"s" * 32
STRONG = PrivacyConfig(
    defence="gaussian", clip=2.0, noise=0.3, clip_gradient=0.01, noise_gradient=0.5
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """See `one_thread`."""


def trained(defence: Defence | None, bottom: nn.Module | None = None) -> tuple[Parts, float]:
    """Parts after three steps, and the last loss."""
    parts, train = split(tiny_model("llama"), CUT), TrainConfig(lr=1e-2)
    if bottom is not None:
        parts.bottom = bottom  # type: ignore[assignment]
    defend(parts.bottom, parts.top, defence)
    engine = engine_for(parts.trunk, train)
    engine.open_round(1, 1, training=True)
    link = LocalLink(engine.open("a", client="client-0", steps=3))
    steps = random_steps(3, seed=5)
    done = streamed.train(parts.bottom, parts.top, link, steps, 3, train, place())
    return parts, done.losses[-1]


def test_the_defences_that_ship() -> None:
    assert list(defences()) == ["gaussian", "nopeek"]
    assert find_defence("none") is None
    with pytest.raises(ValueError, match="one of none, gaussian, nopeek, got 'gausian'"):
        find_defence("gausian")


def test_noise_is_normal_and_hangs_on_secret_place_and_values() -> None:
    """Only who has the secret can repeat it, for the same values at the same place alone."""
    values = torch.randn(64, 64)
    key = key_of(SECRET, "h1", values)
    noise = normal(key, torch.Size((200, 500)))
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    assert abs(float((noise.abs() < 1).float().mean()) - 0.6827) < 0.005
    assert torch.equal(noise, normal(key, torch.Size((200, 500))))
    assert key_of(SECRET, "h1", values.clone()) == key
    changed = values.clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    others = [
        key_of(b"t" * 32, "h1", values),
        key_of(SECRET, "dL/dh2", values),
        key_of(SECRET, "h1 train/1/0/1", values),
        key_of(SECRET, "h1", changed),
    ]
    assert len({key, *others}) == 5
    for other in others:
        both = torch.stack([noise, normal(other, torch.Size((200, 500)))]).flatten(1)
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.02


def test_what_is_sent_is_bounded_and_noisy() -> None:
    """Clipped to the length, a short row as it was; noise of the stated size on each element."""
    h1_BTD = torch.randn(2, 50, 64) * torch.linspace(0.01, 2, 50)[:, None]
    mask_BT = torch.ones(2, 50, dtype=torch.long)
    mask_BT[1, 20:] = 0
    for unit, dims in (("token", (2,)), ("sequence", (1, 2))):
        rows = clipped(h1_BTD, mask_BT, 3.0, unit) * mask_BT[..., None]
        assert float(rows.square().sum(dims).sqrt().max()) <= 3.0 * (1 + 1e-6)
    short = h1_BTD[:, :1]
    assert torch.equal(clipped(short, None, 3.0, "token"), short)
    plain = Gaussian(PrivacyConfig(defence="gaussian", clip=3.0), SECRET)
    noisy = Gaussian(PrivacyConfig(defence="gaussian", clip=3.0, noise=0.5), SECRET)
    difference = (noisy.up(h1_BTD, mask_BT) - plain.up(h1_BTD, mask_BT))[mask_BT.bool()]
    assert abs(float(difference.std()) - 1.5) < 0.05


@pytest.mark.parametrize("crossing", ["up", "back"])
def test_equal_examples_look_unlike(crossing: str) -> None:
    """In one batch, in another one, and in another round: else who sees two equal frames knows that
    two texts are the same, and no noise is large enough for an epsilon."""
    defence = make_defence(STRONG, SECRET)
    assert defence is not None
    noisy = getattr(defence, crossing)
    twice = torch.randn(1, 7, 16).expand(2, 7, 16)
    sent = [*noisy(twice, None, "train/1/0/0"), *noisy(twice, None, "train/1/0/1")]
    for one in range(4):
        for other in range(one):
            both = torch.stack([sent[one] - sent[other], sent[one]])
            assert float(both[0].abs().min()) > 0
    again = noisy(twice, None, "train/1/0/1")
    assert torch.equal(torch.stack(sent[2:]), again)


def test_each_step_of_each_round_is_a_place_of_its_own() -> None:
    """Through the client's own step: the same batch and weights, and noise that differs."""
    sent = list[Tensor]()

    class Heard(Gaussian):
        def up(self, h1_BTD: Tensor, mask_BT: Tensor | None, place: str = "") -> Tensor:
            sent.append(super().up(h1_BTD, mask_BT, place).detach())
            return h1_BTD

        def back(self, grad_BTD: Tensor, mask_BT: Tensor | None, place: str = "") -> Tensor:
            sent.append(super().back(grad_BTD, mask_BT, place))
            return grad_BTD

    parts, batch = split(tiny_model("llama"), CUT), random_batch(3, 2, 5, "right")
    defend(parts.bottom, parts.top, Heard(STRONG, SECRET))
    for number in (1, 2):
        there = replace(place(), round=number)
        ends = Ends(parts.bottom, parts.top, 2, TrainConfig(), there)
        for step, micro in ((0, 0), (0, 1), (1, 0)):
            h1_BTD = ends.up(step, micro, batch).detach()
            ends.across(step, micro, batch, h1_BTD, batch.tokens)
    evaluation = Evaluation(parts.bottom, parts.top, Deaf(), TrainConfig())
    for position in (0, 1):
        evaluation.compute(position, batch)
    assert len({frame.numpy().tobytes() for frame in sent}) == len(sent) == 14


def test_padding_changes_no_noise() -> None:
    """It does not travel."""
    defence = make_defence(STRONG, SECRET)
    assert defence is not None
    h1_BTD = torch.randn(3, 7, 16)
    whole = defence.up(h1_BTD, None)
    padded = torch.cat([h1_BTD, torch.randn(3, 2, 16)], 1)
    mask_BT = torch.ones(3, 9).long()
    mask_BT[:, 7:] = 0
    assert torch.equal(defence.up(padded, mask_BT)[:, :7], whole)


class Deaf:
    """A link that nobody listens to."""

    def compute(self, *args: Any, **told: Any) -> None:
        """See `Sender.compute`."""


class Inserted(nn.Module):
    """The unsplit model's own bottom with clip and noise behind it, written another way."""

    def __init__(self, bottom: nn.Module, config: PrivacyConfig) -> None:
        super().__init__()
        self.bottom, self.own = bottom, config

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        h_BTD: Tensor = self.bottom(ids, mask)
        length = torch.linalg.vector_norm(h_BTD, dim=-1, keepdim=True)
        rows = torch.where(length > self.own.clip, h_BTD / length * self.own.clip, h_BTD)
        noise = torch.zeros_like(h_BTD)
        for row in range(len(ids)):
            here = slice(None) if mask is None else mask[row].bool()
            values = h_BTD[row, here].detach()
            noise[row, here] = normal(key_of(SECRET, f"h1 here {row}", values), values.shape)
        return rows + noise * self.own.noise * self.own.clip


def test_gradients_go_the_way_the_values_came() -> None:
    """Clip and noise inserted into the whole model as modules, and differentiated by torch, give
    the same gradients of the bottom; a clip that were skipped on the way back would not."""
    config = PrivacyConfig(defence="gaussian", clip=0.5, noise=0.2)
    batch = random_batch(3, 4, 9, "right")
    grads = []
    for way in ("defended", "inserted"):
        parts = split(tiny_model("llama"), CUT)
        bottom: nn.Module = parts.bottom
        if way == "defended":
            defend(parts.bottom, parts.top, make_defence(config, SECRET))
            say_place(parts.bottom, "here")
        else:
            bottom = Inserted(parts.bottom, config)
        mask = batch.attention_mask
        h1_BTD = bottom(batch.input_ids, mask)
        logits = parts.top(parts.trunk(h1_BTD, mask), mask)
        logits[mask.bool()].square().mean().backward()
        grads.append([p.grad.clone() for p in parts.bottom.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert float((one - other).abs().max()) < 1e-6


def test_dl_dh2_passes_the_defence() -> None:
    """What leaves through the top's input is clipped and noisy; the top's own gradients are not."""
    parts, plain = split(tiny_model("llama"), CUT), split(tiny_model("llama"), CUT)
    config = PrivacyConfig(defence="gaussian", clip_gradient=1e-3, noise_gradient=0.1)
    defend(parts.bottom, parts.top, make_defence(config, SECRET))
    h2_BTD = torch.randn(2, 5, 32)
    sent = []
    for each in (parts, plain):
        own = h2_BTD.clone().requires_grad_()
        each.top(own, None).square().mean().backward()
        assert own.grad is not None
        sent.append(own.grad)
    noise = sent[0] - clipped(sent[1], None, 1e-3, "token")
    assert 0.5e-4 < float(noise.std()) < 2e-4
    for one, other in zip(parts.top.parameters(), plain.top.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_off_is_what_was_before_and_on_is_repeatable() -> None:
    """To the bit, and parts that were defended once can be freed of it."""
    plain, loss = trained(None)
    off, off_loss = trained(make_defence(PrivacyConfig(), SECRET))
    assert loss == off_loss
    assert largest_difference(plain.bottom, off.bottom) == 0
    one, noisy_loss = trained(make_defence(STRONG, SECRET))
    two, again = trained(make_defence(STRONG, SECRET))
    assert noisy_loss == again != loss
    assert largest_difference(one.bottom, two.bottom) == 0
    _, other = trained(make_defence(STRONG, b"t" * 32))
    assert other != noisy_loss
    defend(one.bottom, one.top, None)
    fresh = split(tiny_model("llama"), CUT)
    fresh.bottom.load_state_dict(one.bottom.state_dict())
    ids = random_batch(3, 2, 5, "right").input_ids
    assert torch.equal(one.bottom(ids, None), fresh.bottom(ids, None))


def test_distance_correlation_is_known_where_it_can_be() -> None:
    """1 of what is the same but for a turn and a scale, about 0 of what is independent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator)
    turned = 5 * x @ torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    other = torch.randn(400, 3, generator=generator)
    own, same, foreign = (torch.cdist(each, each) for each in (x, turned, other))
    assert math.isclose(float(distance_correlation(own, same)), 1.0, abs_tol=1e-4)
    assert float(distance_correlation(own, foreign)) < 0.2


def test_nopeek_moves_the_bottom_and_not_the_rest() -> None:
    """A large weight makes activations say less of their tokens than training alone does."""
    config = PrivacyConfig(defence="nopeek", weight=50.0)
    (plain, _), (parts, _) = trained(None), trained(make_defence(config, SECRET))
    assert largest_difference(plain.bottom, parts.bottom) > 0
    batch = random_batch(3, 6, 12, "right")
    found = []
    for each in (plain, parts):
        h1_ND = each.bottom(batch.input_ids, None).detach().flatten(0, 1)
        ids_N = batch.input_ids.flatten()
        differ = (ids_N[:, None] != ids_N[None]).float()
        found.append(float(distance_correlation(torch.cdist(h1_ND, h1_ND), differ)))
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"noise": 0.5}, "set privacy.defence=gaussian"),
        ({"defence": "gaussian"}, "changes nothing"),
        ({"defence": "gaussian", "noise": -1.0}, "a number, 0 or more"),
        ({"defence": "nopeek", "weight": 0.0}, "changes nothing"),
        ({"weight": 1.0}, "set privacy.defence=nopeek, or privacy.weight=0.1"),
        ({"defence": "nopeek", "unit": "sequence"}, "set privacy.defence=gaussian"),
        ({"delta": 0.0}, "a number between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PrivacyConfig(**settings)  # type: ignore[arg-type]


def test_what_changes_something_is_not_refused() -> None:
    """A clip of dL/dh2 alone is a defence."""
    for name in ("clip", "noise", "clip_gradient", "noise_gradient"):
        PrivacyConfig(defence="gaussian", **{name: 0.1})  # type: ignore[arg-type]
    PrivacyConfig(defence="gaussian", clip=1.0, unit="sequence", delta=0.1)
    PrivacyConfig(defence="nopeek", weight=2.0)


@pytest.mark.parametrize("changes", ["tuning.bottom=frozen", "tuning.bottom=lora cut.bottom=0"])
def test_a_bottom_that_does_not_learn_cannot_be_taught(changes: str) -> None:
    """The run would go on as if there were no defence."""
    with pytest.raises(ConfigError, match=r"and with tuning.bottom=.* it learns nothing"):
        load_config("demo", f"privacy.defence=nopeek {changes}")
    load_config("demo", "privacy.defence=nopeek")


def test_a_defence_that_is_copied_still_defends() -> None:
    """Parts are copied in many places."""
    parts = split(tiny_model("llama"), CUT)
    defend(parts.bottom, parts.top, make_defence(STRONG, SECRET))
    ids = random_batch(3, 2, 5, "right").input_ids
    other = copy.deepcopy(parts.bottom)
    assert torch.equal(other(ids, None), parts.bottom(ids, None))
    say_place(other, "elsewhere")
    assert not torch.equal(other(ids, None), parts.bottom(ids, None))
