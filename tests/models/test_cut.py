"""Cut arithmetic: every block belongs to exactly one part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import Cut


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
