"""A bridge by itself: its start, what it learns, its state and its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.bridge import (
    BRIDGE_FILE,
    Bridge,
    Regression,
    bridge_state,
    load_bridge,
    load_bridge_state,
    missed_share,
    save_bridge,
    take_bridge,
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def crossed(seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h1, an h2 that depends on it, and a mask with padding."""
    generator = torch.Generator().manual_seed(seed)
    h1_BTD = torch.randn(4, 8, 16, generator=generator)
    turn_DD = torch.randn(16, 16, generator=torch.Generator().manual_seed(99)) / 4
    mask_BT = torch.ones(4, 8, dtype=torch.int64)
    mask_BT[0, :5] = 0
    return h1_BTD, h1_BTD + scale * torch.tanh(h1_BTD @ turn_DD), mask_BT


def test_at_first_it_passes_h1_on() -> None:
    h1_BTD, _, _ = crossed()
    assert torch.equal(Bridge(16, 8)(h1_BTD), h1_BTD)


def test_it_learns_and_draws_no_random_number_of_the_process() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    regression = Regression(Bridge(16, 32, seed=1))
    missed = [regression.learn(*crossed(seed)) for seed in range(300)]
    assert torch.equal(torch.get_rng_state(), before)
    assert missed[-1] < 0.5 * missed[0]


def test_padding_and_sizes_do_not_count() -> None:
    h1_BTD, h2_BTD, mask_BT = crossed()
    bridge = Bridge(16, 8, seed=1)
    missed = missed_share(bridge, h1_BTD, h2_BTD, mask_BT)
    other_BTD = h2_BTD.masked_fill(mask_BT[..., None] == 0, 1e4)
    assert torch.equal(missed_share(bridge, h1_BTD, other_BTD, mask_BT), missed)
    larger = missed_share(bridge, 100 * h1_BTD, 100 * h2_BTD, mask_BT)
    assert torch.allclose(larger, missed, rtol=1e-4)


def test_what_is_not_finite_teaches_nothing() -> None:
    bridge = Bridge(16, 8)
    before = {name: tensor.clone() for name, tensor in bridge_state(bridge).items()}
    h1_BTD, h2_BTD, _ = crossed()
    Regression(bridge).learn(h1_BTD, h2_BTD * float("inf"), None)
    assert all(torch.equal(before[name], each) for name, each in bridge_state(bridge).items())


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    smooth, broken = Regression(Bridge(16, 8)), Regression(Bridge(16, 8))
    for seed in range(6):
        smooth.learn(*crossed(seed))
        again = Regression(Bridge(16, 8, seed=7))
        if seed:
            again.load_state_dict({n: t.clone() for n, t in broken.state_dict().items()})
            broken = again
        broken.learn(*crossed(seed))
    one, other = bridge_state(smooth.bridge), bridge_state(broken.bridge)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_its_file_holds_it(tmp_path: Path) -> None:
    bridge = Bridge(16, 8, seed=3)
    save_bridge(bridge_state(bridge), tmp_path, fingerprint="abc")
    read = load_bridge(tmp_path, hidden_size=16)
    assert all(
        torch.equal(bridge_state(read)[n], tensor) for n, tensor in bridge_state(bridge).items()
    )


def test_its_tensors_are_told_from_those_of_the_ends() -> None:
    state = {**bridge_state(Bridge(16, 8)), "model.norm.weight": torch.ones(16)}
    own, rest = take_bridge(state)
    assert (len(own), list(rest)) == (3, ["model.norm.weight"])
    with pytest.raises(ValueError, match=r"\(4, 16\)"):
        load_bridge_state(Bridge(16, 4), own)


def test_what_is_no_bridge_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.bridge=256, or make one with `graft bridge`"):
        load_bridge(tmp_path, hidden_size=16)
    file = tmp_path / BRIDGE_FILE
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        load_bridge(tmp_path, hidden_size=16)
    save_file({"gate": torch.ones(8, 16)}, file)
    with pytest.raises(ValueError, match="the bridge has"):
        load_bridge(tmp_path, hidden_size=16)
    save_bridge(bridge_state(Bridge(16, 8)), tmp_path)
    with pytest.raises(ValueError, match="of 16, the model's have 32"):
        load_bridge(tmp_path, hidden_size=32)
