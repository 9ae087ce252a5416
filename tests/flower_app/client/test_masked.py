"""Masks and fixed point: the mean to its bound, what overflows, and keys in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flower_app.client.masked import hide, reveal
from flower_app.client.site_key import SiteKey, key_of_node, new_site_key, read_site_key
from simulations.cli.app import app
from strategies.aggregate.masked import MOST_TOKENS, MaskedSum, add_up, take_masked
from strategies.aggregate.means import weighted_mean

KEY = SiteKey(bytes(range(32)))


def states(scale: float, count: int = 5) -> list[dict[str, torch.Tensor]]:
    """Random ends, with values as large as can be among them."""
    torch.manual_seed(0)
    found = [{"a": scale * torch.randn(30, 70), "b": torch.rand(3, 2, 4)} for _ in range(count)]
    for state in found:
        state["b"][0, 0, 0] = -1023.9
    return found


@pytest.mark.parametrize("scale", [1e-6, 0.02, 100.0])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [3, 70001, 12, 9999, 5], [2**26] * 5])
def test_the_mean_is_exact_to_its_bound(scale: float, weights: list[int]) -> None:
    given = states(scale)
    total = add_up([(hide(s, n, KEY), float(n)) for s, n in zip(given, weights, strict=True)])
    found, rest = take_masked({**total.state_dict(), "tensor/x": torch.ones(1)})
    assert found is not None
    assert rest.keys() == {"tensor/x"}

    mean = reveal(found, KEY)

    exact = weighted_mean(given, weights, dtype=torch.float64)
    bound = 5 / (2 * sum(weights)) * 2.0**-24
    assert mean.keys() == exact.keys()
    for name, tensor in exact.items():
        off = (mean[name].double() - tensor).abs()
        assert (off <= bound + tensor.abs() * 2.0**-24).all()
        assert mean[name].dtype == torch.float32


def test_a_mask_is_uniform_and_never_comes_again() -> None:
    """Every byte of what is sent is noise, also that of the same tensors sent again."""
    state = {"a": torch.zeros(64, 256)}
    one, other = (hide(state, 7, KEY) for _ in range(2))
    assert one.nonce != other.nonce
    for array in (one.tensors["a"], other.tensors["a"], one.tensors["a"] - other.tensors["a"]):
        counts = np.bincount(np.frombuffer(array.numpy().tobytes(), np.uint8), minlength=256)
        chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert 150 < chi < 400  # 255 degrees of freedom
    assert not np.array_equal(KEY.mask(one.nonce, "a", 9), KEY.mask(one.nonce, "b", 9))


def test_what_cannot_be_added_is_refused_in_words() -> None:
    good = {"a": torch.ones(3)}
    with pytest.raises(ValueError, match="'a' holds 2e\\+03; masked ends are smaller than 1024"):
        hide({"a": torch.full((3,), 2000.0)}, 1, KEY)
    with pytest.raises(ValueError, match="not finite"):
        hide({"a": torch.tensor([float("nan")])}, 1, KEY)
    masked = hide(good, MOST_TOKENS - 1, KEY)
    with pytest.raises(ValueError, match="could overflow masked sums"):
        add_up([(masked, float(MOST_TOKENS - 1)), (hide(good, 1, KEY), 1.0)])
    with pytest.raises(ValueError, match="one mask"):
        add_up([(masked, 1.0), (masked, 1.0)])
    with pytest.raises(ValueError, match="different site keys"):
        add_up([(masked, 1.0), (hide(good, 1, SiteKey(bytes(32))), 1.0)])
    with pytest.raises(ValueError, match="another site key"):
        reveal(add_up([(masked, 1.0)]), SiteKey(bytes(32)))


def test_a_sum_that_is_none_is_refused() -> None:
    """A server, or a client, that puts anything else in its place makes nonsense of the mean."""
    total = add_up([(hide({"a": torch.ones(1000)}, 5, KEY), 5.0)])
    total.tensors["a"].random_()
    with pytest.raises(ValueError, match="a client has sent something else"):
        reveal(total, KEY)
    chosen = MaskedSum({"a": torch.ones(3, dtype=torch.int64)}, (), 1, KEY.check)
    with pytest.raises(ValueError, match="under no mask"):
        reveal(chosen, KEY)


def test_the_command_makes_a_key_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "new" / "key"
    result = CliRunner().invoke(app, ["site-key", "new", str(file)])
    assert result.exit_code == 0, result.output
    key = read_site_key(file)
    assert key.check.hex() in result.output
    assert file.read_text().strip() not in result.output
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_text()
    assert "is there already" in CliRunner().invoke(app, ["site-key", "new", str(file)]).output
    assert file.read_text() == before


def test_files_that_are_no_keys_are_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "key"
    new_site_key(file)
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        key_of_node({"site-key": str(file)})
    file.chmod(0o600)
    file.write_text("secret\n")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        key_of_node({"site-key": str(file)})
    with pytest.raises(ValueError, match="relative path"):
        key_of_node({"site-key": "key"})
