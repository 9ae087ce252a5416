"""Cut arithmetic: every block belongs to exactly one part."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import Cut, client_state, in_ends, split, trainable_state
from tests.models.helpers import tiny


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 120))
def test_ranges_cover_all_blocks_or_refuse(bottom: int, top: int, blocks: int) -> None:
    if bottom + top >= blocks:
        with pytest.raises(ValueError, match="leaves no trunk"):
            Cut(bottom, top).ranges(blocks)
        return
    ranges = Cut(bottom, top).ranges(blocks)
    assert [*ranges["bottom"], *ranges["trunk"], *ranges["top"]] == list(range(blocks))
    assert (len(ranges["bottom"]), len(ranges["top"])) == (bottom, top)


def test_refusal_gives_values_and_remedy() -> None:
    with pytest.raises(ValueError) as error:
        Cut(2, 2).ranges(4)
    assert str(error.value) == (
        "split leaves no trunk: the model has 4 blocks, bottom=2 + top=2; lower one of them"
    )


@pytest.mark.parametrize("wrong", [-1, 1.0, "1", True, None])
def test_wrong_counts_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"cut\.bottom"):
        Cut(wrong, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cut\.top"):
        Cut(1, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("model.norm.weight", True),
        ("lm_head.weight", True),
        ("model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.1.mlp.up_proj.lora_A.default.weight", True),
        ("model.layers.2.mlp.up_proj.lora_B.default.weight", False),
        ("model.layers.2.mlp.up_proj.residual", False),
        ("model.layers.10.mlp.up_proj.weight", False),
        ("model.layers.11.self_attn.q_proj.residual", True),
        ("model.layers_norm.2.weight", True),
        ("other.model.layers.2.weight", True),
        ("model.layers.scale", True),
    ],
)
def test_a_name_says_who_holds_a_tensor(name: str, expected: bool) -> None:
    got = in_ends(name, block_list="model.layers", num_blocks=12, cut=Cut(2, 1))
    assert got is expected


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_in_ends_agrees_with_the_parts(family: str) -> None:
    for cut in (Cut(0, 0), Cut(2, 1), Cut(0, 3)):
        parts = split(tiny(family), cut)
        form: dict[str, Any] = {"block_list": parts.trunk.block_list, "num_blocks": 4, "cut": cut}
        assert all(in_ends(n, **form) for n in client_state(parts.bottom, parts.top))
        assert not any(in_ends(n, **form) for n in trainable_state(parts.trunk))


def test_a_block_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="of block 4; the model has 4 blocks"):
        in_ends("h.4.mlp.weight", block_list="h", num_blocks=4, cut=Cut(1, 1))
