"""klt: what it loses, what it saves where channels go together, and what it learns on the way."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.transport.codec.entropy import Writer, class_keys
from strategies.transport.codec.klt import Klt
from tests.strategies.transport.codec.tensors import activations

ERROR = 2**-2 / 12**0.5
"""Of an activation's row, for its step of a quarter."""


class Pair:
    """Both sides of a crossing."""

    def __init__(self, *, gradient: bool = False) -> None:
        self.one, self.other = Klt(1, gradient=gradient), Klt(1, gradient=gradient)
        self.sizes: list[int] = []

    def cross(self, rows_ND: Tensor, draw: int = 0) -> Tensor:
        """What comes out on the other side."""
        data = bytes(self.one.pack(rows_ND, torch.Generator().manual_seed(draw)))
        least, most = self.one.sizes(*rows_ND.shape)
        assert least <= len(data) <= most
        self.sizes.append(len(data))
        return self.other.unpack(memoryview(data), (rows_ND.shape[0], rows_ND.shape[1]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def related(count: int, rows: int = 100, width: int = 32) -> Sequence[Tensor]:
    """Rows whose channels go together: a quarter of the components has nearly all of the length."""
    turn, _ = torch.linalg.qr(random(width, width))
    lengths_D = torch.where(torch.arange(width) < width // 4, 2.0, 0.2)
    return [random(rows, width, seed=n + 1) * lengths_D @ turn for n in range(count)]


def test_what_an_activation_loses() -> None:
    """A quarter of a row's length over the root of 12, and less of the first token's row."""
    rows_ND, pair = activations(), Pair()
    back_ND = pair.cross(rows_ND)

    error_N = (back_ND - rows_ND).norm(dim=1) / (rows_ND - rows_ND[1:].mean(0)).norm(dim=1)
    assert error_N.mean() < 1.1 * ERROR
    assert error_N.max() < 1.4 * ERROR
    assert error_N[0] < 0.3 * ERROR
    assert 8 * pair.sizes[0] / rows_ND.numel() < 4.0


def test_a_mean_row_is_told_once() -> None:
    """What is lost is relative to the rows less their mean."""
    pair, mean_D = Pair(), 10 * random(96)
    for n in range(3):
        own_ND = random(50, 96, seed=n)
        back_ND = pair.cross(own_ND + mean_D)
        assert (back_ND - own_ND - mean_D).norm() / own_ND.norm() < 1.2 * ERROR
    assert max(pair.sizes[1:]) < pair.sizes[0] - 96


def test_axes_are_learnt_and_save_bits() -> None:
    """Once they would have paid; what is lost stays the same."""
    pair, tensors = Pair(), related(12)
    errors = [float((pair.cross(each) - each).norm() / each.norm()) for each in tensors]
    before, after = pair.sizes[0], pair.sizes[-1]

    assert after < 0.75 * before
    assert max(pair.sizes) < 2 * before
    assert max(errors) < 1.1 * ERROR


def test_axes_that_do_not_pay_are_not_sent() -> None:
    pair = Pair()
    for n in range(12):
        pair.cross(random(100, 32, seed=n))
    assert max(pair.sizes) < 1.05 * min(pair.sizes)


def test_gradients_are_not_biased() -> None:
    """With or without axes, and rows far below the step among them."""
    pair = Pair(gradient=True)
    for each in related(12):
        pair.cross(each)
    assert min(pair.sizes) < 0.8 * pair.sizes[0]
    rows_ND = related(1, rows=4)[0] ** 3
    rows_ND[2] *= 1e-3
    draws = 300

    for each in (pair, Pair(gradient=True)):
        backs = torch.stack([each.cross(rows_ND, n) for n in range(draws)])
        off_ND = (backs.mean(0) - rows_ND) / (backs.std(0) / draws**0.5)
        assert off_ND.abs().mean() < 0.95
        along_N = (backs.mean(0) * rows_ND).sum(1) / rows_ND.square().sum(1)
        assert torch.allclose(along_N[[0, 1, 3]], torch.ones(3), atol=0.02)


def test_a_small_row_of_a_gradient_is_not_drowned() -> None:
    """In a dither of the tensor's step: a prompt's rows are 30 times smaller than the answer's."""
    rows_ND = random(64, 96)
    rows_ND[::2] /= 300
    back_ND = Pair(gradient=True).cross(rows_ND)
    error_N = (back_ND - rows_ND).norm(dim=1) / rows_ND.norm(dim=1)
    assert error_N[1::2].max() < 0.4
    assert error_N[::2].max() < 12


def test_zero_rows_stay_zero() -> None:
    assert not Pair(gradient=True).cross(torch.zeros(5, 24)).any()
    rows_ND = torch.zeros(5, 24)
    rows_ND[3] = random(24)
    back_ND = Pair(gradient=True).cross(rows_ND)
    assert not back_ND[[0, 1, 2, 4]].any()
    assert back_ND[3].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (3, 24), (2, 33), (5, 1500), (200, 1)])
@pytest.mark.parametrize("gradient", [False, True])
def test_any_shape_crosses(shape: tuple[int, int], gradient: bool) -> None:
    pair = Pair(gradient=gradient)
    for n in range(3):
        rows_ND = random(*shape, seed=n)
        back_ND = pair.cross(rows_ND)
        assert back_ND.shape == shape
        assert (back_ND - rows_ND).norm() / rows_ND.norm() < (0.8 if gradient else 0.15)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e30])
def test_any_magnitude_crosses(scale: float) -> None:
    rows_ND = activations(8, 64)
    usual = Pair().cross(rows_ND)
    back_ND = Pair().cross(rows_ND * scale)
    assert torch.allclose(back_ND / scale, usual, rtol=0.05, atol=0.3 * float(usual[1].std()))


def test_magnitudes_may_change_within_a_session() -> None:
    pair = Pair()
    for scale in (1.0, 1e6, 0.0, 1e-6, 1.0):
        rows_ND = activations(16, 64) * scale
        back_ND = pair.cross(rows_ND)
        assert (back_ND - rows_ND).norm() <= 0.1 * rows_ND.norm()


def test_a_session_goes_on_in_another_process() -> None:
    """From the state alone, on either side, before and after axes are known."""
    tensors = [each + 5 for each in related(14)]
    whole, parts = Pair(), Pair()
    for n, each in enumerate(tensors):
        for side in ("one", "other"):
            fresh = Klt(1)
            fresh.load_state_dict(getattr(parts, side).state_dict())
            setattr(parts, side, fresh)
        assert torch.equal(whole.cross(each, n), parts.cross(each, n))
    assert whole.sizes == parts.sizes


def test_the_same_session_makes_the_same_bytes() -> None:
    one, again = Pair(gradient=True), Pair(gradient=True)
    for n, each in enumerate(related(10)):
        assert torch.equal(one.cross(each, n), again.cross(each, n))
    assert one.sizes == again.sizes


def test_a_frame_without_those_before_it_is_read_or_refused() -> None:
    """It says how sizes changed and leaves out what is known: another side has not got that."""
    pair = Pair()
    for each in related(11):
        pair.cross(each)
    data = bytes(pair.one.pack(related(1)[0], torch.Generator()))
    try:
        assert Klt(1).unpack(memoryview(data), (100, 32)).isfinite().all()
    except ValueError as error:
        assert str(error)  # noqa: PT017 - either will do


def written(count: int, class_number: int) -> bytes:
    """So many ones."""
    writer = Writer()
    writer.put(np.ones(count, np.int32), class_keys(np.full(count, class_number)))
    return writer.data()


HEAD = struct.Struct("<BfhI")
CHANGES, AXES = written(24, -2), written(24 * 24, 4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (HEAD.pack(8, 1.0, 0, 0), "flags are 8"),
        (HEAD.pack(5, 1.0, 0, 0), "flags are 5"),
        (HEAD.pack(0, float("nan"), 0, 0), "the scale is nan"),
        (HEAD.pack(0, -1.0, 0, 0), "the scale is -1"),
        (HEAD.pack(4, 0.0, 0, 0) + bytes(99), "takes 192 bytes, 99 came"),
        (HEAD.pack(1, 1.0, 0, 0) + bytes(20), "takes 48 bytes, 20 came"),
        (HEAD.pack(0, 1.0, 0, 0) + bytes(1), "takes 2 bytes, 1 came"),
        (HEAD.pack(0, 1.0, 0, 0) + b"\xff" * 2 + CHANGES, "has a size that none can have"),
        (HEAD.pack(0, 1.0, 999, 0) + b"\x01" * 2 + CHANGES, "has a size that none can have"),
        (HEAD.pack(0, 1.0, 0, 0) + b"\x01" * 2 + bytes(3), "3 bytes are no entropy-coded words"),
        (HEAD.pack(2, 1.0, 0, 0) + b"\x01" * 2 + AXES, "axes of 24 channels came with 2 rows"),
    ],
)
def test_what_is_no_frame_of_it_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Klt().unpack(memoryview(data), (2, 24))


def test_axes_that_are_none_are_refused() -> None:
    data = HEAD.pack(2, 1.0, 0, 0) + b"\x01" * 10 + AXES
    with pytest.raises(ValueError, match="axes are not orthogonal"):
        Klt().unpack(memoryview(data), (10, 24))


def test_rows_of_another_width_begin_anew() -> None:
    pair = Pair()
    for each in (*related(12), random(4, 24), *related(2)):
        assert (pair.cross(each) - each).norm() < 0.1 * each.norm()
    assert pair.sizes[-1] > 1.2 * pair.sizes[-4]
