"""klt loses no more of a row than it may, whatever it has learnt from other tensors before."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.transport.codec.klt import Klt, KltFine

WIDTH = 16
ACTIVATION, GRADIENT = 0.14, 0.8
"""Half a step of a quarter, of a row whose size is rounded to a quarter of an octave; and what is
lost of a gradient, as a share of the geometric mean of its length and the tensor's."""

MEAN_D = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) * 30
TURN_DD = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)))[0]


def noise(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def related(rows: int, seed: int) -> Tensor:
    """Few of its axes have most of its length: enough rows of it, and axes are sent."""
    return noise(rows, seed) * torch.logspace(1, -3, WIDTH) @ TURN_DD


def with_zero_row(rows: int, seed: int) -> Tensor:
    rows_ND = noise(rows, seed) + MEAN_D
    rows_ND[seed % rows] = 0
    return rows_ND


def of_any_length(rows: int, seed: int) -> Tensor:
    return noise(rows, seed) * torch.logspace(-6, 6, rows)[:, None]


def with_spike(rows: int, seed: int) -> Tensor:
    rows_ND = noise(rows, seed) + MEAN_D
    rows_ND[0, seed % WIDTH] = 1e8
    return rows_ND


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "noise": noise,
    "related": related,
    "mean": lambda rows, seed: noise(rows, seed) + MEAN_D,
    "far mean": lambda rows, seed: noise(rows, seed) * 1e-3 - MEAN_D,
    "zero row": with_zero_row,
    "constant": lambda rows, seed: MEAN_D.expand(rows, WIDTH).contiguous(),
    "lengths": of_any_length,
    "spike": with_spike,
    "zeros": lambda rows, seed: torch.zeros(rows, WIDTH),
}
TENSORS = st.tuples(
    st.sampled_from(sorted(KINDS)), st.sampled_from([1, 2, 4, 5, 40, 200]), st.integers(-6, 6)
)


def check(gradient: bool, tensors: list[tuple[str, int, int]]) -> None:
    """Send them, one after the other, over one crossing."""
    one, other = Klt(1, gradient=gradient), Klt(1, gradient=gradient)
    for n, (kind, rows, exponent) in enumerate(tensors):
        rows_ND = KINDS[kind](rows, n) * 10.0**exponent
        data = bytes(one.pack(rows_ND, torch.Generator().manual_seed(n)))
        least, most = one.sizes(rows, WIDTH)
        assert least <= len(data) <= most
        back_ND = other.unpack(memoryview(data), (rows, WIDTH))

        length_N, lost_N = rows_ND.norm(dim=1), (back_ND - rows_ND).norm(dim=1)
        allowed_N = ACTIVATION * length_N
        if gradient:
            whole = rows_ND.norm() / math.sqrt(rows)
            allowed_N = GRADIENT * (whole * torch.minimum(length_N, whole)).sqrt()
        # What is smaller than the largest element by 2**30 is zero; fp32 has 24 bits.
        allowed_N += 2.0**-28 * math.sqrt(WIDTH) * rows_ND.abs().max() + 2.0**-21 * length_N
        worst = int((lost_N - allowed_N).argmax())
        assert (lost_N <= allowed_N).all(), (n, kind, worst, lost_N[worst], allowed_N[worst])


LEARNT = [("related", 200, 0)] * 3


@pytest.mark.parametrize("gradient", [False, True])
@given(tensors=st.lists(TENSORS, max_size=6))
@example(tensors=[("mean", 200, 4), ("noise", 1, 0)])
@example(tensors=[("mean", 200, 4), ("noise", 4, 0)])
@example(tensors=[("mean", 200, 0), ("zero row", 200, 0)])
@example(tensors=[*LEARNT, ("noise", 4, -6), ("zero row", 200, 6)])
@example(tensors=[("lengths", 200, 0), ("spike", 40, 0), ("spike", 5, 6)])
@settings(max_examples=60, deadline=None)
def test_no_row_loses_more_than_its_share(
    gradient: bool, tensors: list[tuple[str, int, int]]
) -> None:
    check(gradient, tensors)


@pytest.mark.parametrize("gradient", [False, True])
def test_axes_of_other_rows_cost_no_more_either(gradient: bool) -> None:
    """As soon as they are known, every kind of tensor at every scale meets them."""
    one = Klt(1, gradient=gradient)
    for n, (kind, rows, _) in enumerate(LEARNT):
        one.pack(KINDS[kind](rows, n), torch.Generator())
    assert "axes" in one.state_dict()
    for kind in KINDS:
        for exponent in (-6, 0, 6):
            check(gradient, [*LEARNT, (kind, 4, exponent), (kind, 200, -exponent)])


def test_the_longest_row_there_can_be_is_not_cut() -> None:
    """One channel, a thousand million times the other rows: as fine as numbers are coded."""
    rows_ND = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0))
    rows_ND[0] = 0
    rows_ND[0, 7] = 8e8
    data = bytes(KltFine(1).pack(rows_ND, torch.Generator()))
    back_ND = KltFine(1).unpack(memoryview(data), (20, 4096))
    assert (back_ND - rows_ND).norm(dim=1)[0] < 0.01 * rows_ND[0].norm()
