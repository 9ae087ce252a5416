"""What is refused, and that it is refused in words: untested families, and splits that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import Cut, families, load_part, split
from models.families import NAMED
from models.verify import check_twin
from tests.models.helpers import assert_exact, saved, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = Cut(1, 1)


def untested(family: str, **changes: Any):  # type: ignore[no-untyped-def]
    """A model under a name that no table has."""
    model = tiny(family, **changes)
    model.config.model_type = "novel"
    return model


def test_the_named_families_are_tested() -> None:
    assert set(NAMED) <= set(families.tested_families())
    assert len(NAMED) == 12


def test_an_untested_family_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'novel' is not tested.*allow-untested"):
        split(untested("llama"), CUT)


def test_an_untested_family_that_is_exact_may_be_split() -> None:
    model = tiny("deepseek_v32")
    assert_exact(model, split(model, CUT, allow_untested=True), "deepseek_v32")


def test_modes_and_weights_survive_the_check() -> None:
    model = tiny("deepseek_v32").train()
    model.model.layers[1].eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parts = split(model, CUT, allow_untested=True)
    assert model.training
    assert parts.trunk.training
    assert not model.model.layers[1].training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "family,words",
    [
        ("llama", "encoder-decoder"),
        ("xlm", "need exactly one"),
        ("reformer", "cannot be split"),
    ],
)
def test_structures_that_cannot_be_split_are_refused(family: str, words: str) -> None:
    model = tiny(family)
    model.config.is_encoder_decoder = family == "llama"
    with pytest.raises(ValueError, match=words):
        split(model, CUT, allow_untested=True)


@pytest.mark.parametrize(
    "family,flag,value",
    [
        ("opt", "layerdrop", 0.1),
        ("llama", "num_kv_shared_layers", 2),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_configs_that_tie_blocks_together_are_refused(family: str, flag: str, value: Any) -> None:
    with pytest.raises(ValueError, match=flag):
        split(tiny(family, **{flag: value}), CUT)


class _Between(nn.Module):
    """A block list whose blocks reach for the embedding, as some models' do."""

    def __init__(self, block: nn.Module, memory: dict[str, torch.Tensor], first: bool) -> None:
        super().__init__()
        self.block = block
        self.__dict__["memory"] = memory
        self.first = first

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.first:
            self.memory["x0"] = hidden_states
        return self.block(hidden_states, **kwargs) + 0.1 * self.memory.get("x0", 0.0)


def test_state_that_blocks_share_in_secret_is_found() -> None:
    """Blocks that read the embedding through a side door: refused, never a wrong answer."""
    model = untested("llama")
    memory: dict[str, torch.Tensor] = {}
    for i, block in enumerate(list(model.model.layers)):
        model.model.layers[i] = _Between(block, memory, i == 0)
    with pytest.raises(ValueError, match="not exact"):
        split(model, CUT, allow_untested=True)


def test_weights_used_between_the_blocks_are_found() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(ValueError, match="shared between blocks"):
        split(model, CUT)


def test_a_weight_that_no_part_uses_is_found() -> None:
    model = tiny("llama")
    model.model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"cannot tell which part uses the weight model\.scale"):
        split(model, CUT)


def test_loading_checks_a_twin_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "deepseek_v32")
    with pytest.raises(ValueError, match="allow-untested"):
        load_part("trunk", str(tmp_path), CUT, attention="eager")
    load_part("trunk", str(tmp_path), CUT, attention="eager", allow_untested=True)
    from models import verify

    monkeypatch.setattr(verify, "compare", lambda *_: verify.Difference(0.0, 0.5, "some.weight"))
    with pytest.raises(ValueError, match="not exact"):
        check_twin(tiny("llama").config, CUT)


def test_the_tested_table_is_the_documented_one(project: Path) -> None:
    rows = [line.split("|") for line in (project / "docs" / "families.md").read_text().splitlines()]
    exact = {row[1].strip() for row in rows if len(row) > 4 and row[2].strip() == "exact"}
    assert set(families.tested_families()) <= exact
