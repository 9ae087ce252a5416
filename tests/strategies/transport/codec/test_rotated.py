"""int8 to int2: what they lose on tensors that cross a cut, and what they take from strangers."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from strategies.transport.codec.bits import pack_bits, packed_size, unpack_bits
from strategies.transport.codec.registry import find_codec
from strategies.transport.codec.rotation import Rotation
from tests.strategies.transport.codec.tensors import activations

NAMES = ("int8", "int6", "int5", "int4", "int3", "int2")
NORMAL = {
    "int8": 0.0070,
    "int6": 0.0262,
    "int5": 0.0510,
    "int4": 0.098,
    "int3": 0.189,
    "int2": 0.35,
}
"""Relative error of the best levels for a normal distribution, and 3 % more."""


def bits_of(name: str) -> int:
    """The number in a codec's name."""
    return int(name.removeprefix("int"))


def there_and_back(
    name: str, rows_ND: Tensor, draw: int = 0, *, gradient: bool = False
) -> tuple[Tensor, int]:
    """What comes out, and how many bytes crossed."""
    generator = torch.Generator().manual_seed(draw)
    data = bytes(find_codec(name)(1, gradient=gradient).pack(rows_ND, generator))
    codec = find_codec(name)(1, gradient=gradient)
    least, most = codec.sizes(*rows_ND.shape)
    assert least <= len(data) <= most
    return codec.unpack(memoryview(data), tuple(rows_ND.shape)), len(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_what_an_activation_loses(name: str) -> None:
    """Every row less than normal ones would: without channels apart they lose their small ones."""
    rows_ND = activations()
    back_ND, size = there_and_back(name, rows_ND)

    small = [c for c in range(576) if c not in (3, 288, 575)]
    error_N = (back_ND - rows_ND)[:, small].norm(dim=1) / rows_ND[:, small].norm(dim=1)
    assert error_N.mean() < 1.05 * NORMAL[name]
    assert error_N.max() < 1.8 * NORMAL[name]
    assert 8 * size / rows_ND.numel() < bits_of(name) + 0.5


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_a_mean_row_costs_no_levels(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mean_D, own_ND = (torch.randn(*n, generator=generator) for n in ((96,), (200, 96)))
    back_ND, _ = there_and_back(name, own_ND + 20 * mean_D)
    assert (back_ND - own_ND - 20 * mean_D).norm() / own_ND.norm() < 1.2 * NORMAL[name]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_mean_row_is_kept_from_rows_that_do_not_have_it(name: str, gradient: bool) -> None:
    """Zeros, and rows much smaller: what is left of the mean in them would be all that they are."""
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(200, 96, generator=generator) + 20 * torch.randn(96, generator=generator)
    rows_ND[7] = 0
    rows_ND[[9, 11]] *= torch.tensor([[1e-4], [100]])

    back_ND, _ = there_and_back(name, rows_ND, gradient=gradient)

    error_N = (back_ND - rows_ND).norm(dim=1) / rows_ND.norm(dim=1)
    assert not back_ND[7].any()
    assert error_N[8] < 0.1 * NORMAL[name]  # it is nearly the mean
    assert error_N[[9, 11]].max() < 1.6 * NORMAL[name]


@pytest.mark.parametrize("name", ["int3", "int2"])
def test_gradients_are_not_biased(name: str) -> None:
    """The scale of the least error would have them 12 % short at 2 bits."""
    rows_ND = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)) ** 3
    rows_ND[2] *= 1e-3
    rows_ND[3, 1:] = 0
    draws = 300
    error = NORMAL[name] / draws**0.5

    mean_ND = sum(there_and_back(name, rows_ND, n, gradient=True)[0] for n in range(draws)) / draws

    length_N = rows_ND.square().sum(1)
    along_N = (mean_ND * rows_ND).sum(1) / length_N
    assert torch.allclose(along_N, torch.ones(4), atol=0.01)
    assert (((mean_ND - rows_ND).square().sum(1) / length_N).sqrt() < 2 * error).all()


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_small_gradients_beside_a_large_one_are_not_biased(name: str) -> None:
    """After one round a spike leaves two levels, and small elements come back four times as large
    at 2 bits; the scale of activations shortens them. Rows have different ones: none is apart."""
    generator = torch.Generator().manual_seed(0)
    rows_ND = torch.randn(64, 128, generator=generator)
    large = torch.arange(64), torch.randint(128, (64,), generator=generator)
    rows_ND[large] = 10 * 128**0.5
    draws = [there_and_back(name, rows_ND, n, gradient=True)[0] for n in range(200)]
    small_ND = rows_ND.clone()
    small_ND[large] = 0

    slopes = torch.stack(
        [(back_ND * small_ND).sum() / small_ND.square().sum() for back_ND in draws]
    )
    assert (slopes.mean() - 1).abs() < 5 * slopes.std() / 200**0.5
    assert slopes.std() / 200**0.5 < 0.02


def test_no_two_gradients_are_rotated_alike() -> None:
    """Or their errors would add up over the steps, not cancel."""
    rows_ND = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    one, two = (there_and_back("int2", rows_ND, draw, gradient=True)[0] for draw in (0, 1))
    assert (one - two).norm() / rows_ND.norm() > 0.2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (3, 24), (2, 33), (5, 1000), (1, 576)])
def test_any_shape_crosses(name: str, shape: tuple[int, int]) -> None:
    rows_ND = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    back_ND, size = there_and_back(name, rows_ND)
    assert back_ND.shape == shape
    assert size < 16 + 2 * shape[0] + (bits_of(name) + 1) * (rows_ND.numel() + 8) / 8
    assert (back_ND - rows_ND).norm() / rows_ND.norm() < 1.6 * NORMAL[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e30])
def test_any_magnitude_crosses(name: str, scale: float) -> None:
    rows_ND = activations(8, 64)
    usual, _ = there_and_back(name, rows_ND)
    back_ND, _ = there_and_back(name, rows_ND * scale)
    assert torch.allclose(back_ND / scale, usual, rtol=1e-3, atol=1e-3 * float(usual.std()))


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    """A tensor of nothing else, and the prompt's rows among gradients."""
    assert not there_and_back(name, torch.zeros(5, 24))[0].any()
    rows_ND = torch.zeros(5, 24)
    rows_ND[3] = torch.randn(24, generator=torch.Generator().manual_seed(0))
    back_ND, _ = there_and_back(name, rows_ND, gradient=True)
    assert not back_ND[[0, 1, 2, 4]].any()
    assert back_ND[3].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_draw_makes_the_same_bytes(name: str) -> None:
    """On a resend, a resume and a rerun."""
    rows_ND, codec = activations(), find_codec(name)

    def packed(seed: int) -> bytes:
        return bytes(codec().pack(rows_ND, torch.Generator().manual_seed(seed)))

    assert packed(1) == packed(1) != packed(2)


@pytest.mark.parametrize(
    ("head", "size", "words"),
    [
        ((0, 1.0, 0, 0), 29, "0 channels apart take 30 bytes, 29 came"),
        ((0, 1.0, 0, 0), 31, "0 channels apart take 30 bytes, 31 came"),
        ((0, 1.0, 1, 0), 30, "1 channels apart take 36 bytes, 30 came"),
        ((0, 1.0, 2, 0), 42, "2 channels apart of 24"),
        ((0, 1.0, 2**32 - 1, 0), 30, "4294967295 channels apart of 24"),
        ((0, 1.0, 0, 7), 366, "7 mean rows"),
        ((0, 1.0, 1, 0), 36, "not in order or not below 24"),
    ],
)
def test_what_is_no_frame_of_it_is_refused(
    head: tuple[int, float, int, int], size: int, words: str
) -> None:
    data = struct.pack("<IfII", *head).ljust(size, b"\xff")
    with pytest.raises(ValueError, match=words):
        find_codec("int4")().unpack(memoryview(data), (1, 24))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_packed_without_gaps(bits: int) -> None:
    numbers = torch.randint(2**bits, (83,), dtype=torch.uint8).numpy()
    data = pack_bits(numbers, bits).tobytes()
    assert len(data) <= packed_size(83, bits) <= -(-83 * bits // 8) + bits
    assert (unpack_bits(memoryview(data), 83, bits) == numbers).all()


@pytest.mark.parametrize("width", [1, 2, 17, 24, 64, 576, 1000, 8192])
def test_a_rotation_keeps_lengths_spreads_a_spike_and_goes_back(width: int) -> None:
    rows_ND = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    rows_ND[1] = 0
    rows_ND[1, 0] = 1
    rotation = Rotation(5, width)
    rotated_ND = rotation.forward(rows_ND)

    assert torch.allclose(rotated_ND.norm(dim=1), rows_ND.norm(dim=1), rtol=1e-5)
    assert rotated_ND[1].abs().max() <= 4 / width**0.5
    assert torch.allclose(rotation.back(rotated_ND), rows_ND, atol=1e-5)
