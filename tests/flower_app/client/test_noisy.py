"""A client's update as it leaves: no longer than the clip, under noise of the client alone."""

from __future__ import annotations

import pytest
import torch

from conf.sections.privacy import PrivacyConfig
from flower_app.client.noisy import noisy_ends

START = {"a": torch.zeros(100, 200), "b": torch.ones(300)}
END = {"a": torch.full((100, 200), 0.5), "b": torch.full((300,), 2.0)}


def _length(sent: dict[str, torch.Tensor]) -> float:
    return float(sum((sent[n] - START[n]).double().square().sum() for n in sent)) ** 0.5


def _config(clip: float, noise: float = 0.0) -> PrivacyConfig:
    return PrivacyConfig(update_clip=clip, update_noise=noise)


def test_all_tensors_together_are_no_longer_than_the_clip() -> None:
    """And point where they did; a shorter update is as it was."""
    sent = noisy_ends(_config(3.0), START, END, b"s", "1")
    assert _length(sent) == pytest.approx(3.0, rel=1e-5)
    ratio = (sent["a"] - START["a"]).mean() / (sent["b"] - START["b"]).mean()
    assert float(ratio) == pytest.approx(0.5, rel=1e-4)
    whole = noisy_ends(_config(1000.0), START, END, b"s", "1")
    assert all(torch.equal(whole[name], END[name]) for name in END)
    still = noisy_ends(_config(3.0), START, START, b"s", "1")
    assert all(torch.equal(still[name], START[name]) for name in START)


def test_noise_is_in_multiples_of_the_clip_in_every_tensor() -> None:
    bare, sent = (noisy_ends(_config(3.0, n), START, END, b"s", "1") for n in (0.0, 0.1))
    for name, rel in (("a", 0.03), ("b", 0.15)):
        noise = sent[name] - bare[name]
        assert float(noise.std()) == pytest.approx(0.3, rel=rel)
        assert abs(float(noise.mean())) < 0.06


def test_noise_belongs_to_the_secret_and_the_place() -> None:
    """Who knows neither cannot take it off; what is sent again is the same."""
    once = noisy_ends(_config(3.0, 1.0), START, END, b"s", "1")
    again = noisy_ends(_config(3.0, 1.0), START, END, b"s", "1")
    assert torch.equal(once["a"], again["a"])
    for secret, place in ((b"t", "1"), (b"s", "2")):
        other = noisy_ends(_config(3.0, 1.0), START, END, secret, place)
        both = torch.stack([(one - END["a"]).flatten() for one in (once["a"], other["a"])])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.05


def test_only_what_leaves_counts() -> None:
    """A top of the site's own is in the start and not in what is sent."""
    sent = noisy_ends(_config(3.0), START, {"b": END["b"]}, b"s", "1")
    assert sent.keys() == {"b"}
    assert _length(sent) == pytest.approx(3.0, rel=1e-5)
