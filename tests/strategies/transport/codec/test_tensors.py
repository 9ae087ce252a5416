"""Row 18: tensors say what they are, and nothing else is believed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import (
    WIRE_VERSION,
    decode,
    encode,
    encode_mask,
)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 7)])
def test_fp32_travels_bit_for_bit(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    tensor[0, 0] = float("inf")

    assert torch.equal(decode(encode(tensor, torch.float32), "t"), tensor)


def test_bf16_is_rounded_once() -> None:
    tensor = torch.randn(2, 3, 8)

    back = decode(encode(tensor, torch.bfloat16), "t")

    assert back.dtype == torch.bfloat16
    assert torch.equal(back, tensor.bfloat16())


@given(exponent=st.integers(-60, 60))
def test_fp16_keeps_its_precision_at_any_magnitude(exponent: int) -> None:
    """Gradients of 1e-8 underflow in plain fp16: all would arrive as zero."""
    tensor = torch.linspace(0.5, 1.0, 32) * 2.0**exponent

    back = decode(encode(tensor, torch.float16), "t")

    assert torch.all((back - tensor).abs() <= tensor * 2.0**-11)


@pytest.mark.parametrize("value", [0.0, 3e38])
def test_fp16_takes_zeros_and_very_large_numbers(value: float) -> None:
    tensor = torch.full((2, 2, 2), value)

    assert torch.allclose(decode(encode(tensor, torch.float16), "t"), tensor, rtol=1e-3)


@given(st.integers(1, 5), st.integers(1, 19))
def test_a_mask_is_a_bit_an_element(rows: int, columns: int) -> None:
    mask = torch.rand(rows, columns) > 0.5

    message = encode_mask(mask.long())

    assert len(message.data) == (rows * columns + 7) // 8
    assert torch.equal(decode(message, "mask"), mask)


def test_a_non_contiguous_tensor_keeps_its_order() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2)

    assert torch.equal(decode(encode(tensor, torch.float32), "t"), tensor)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 9}, f"version 9 came, version {WIRE_VERSION}"),
        ({"dtype": 0}, "dtype 0"),
        ({"dtype": 99}, "dtype 99"),
        ({"codec": pb.BITS}, "codec 3"),
        ({"shape": [2, 3, 5]}, r"takes 120 bytes, 96 came"),
        ({"shape": [0, 3, 4]}, "shape"),
        ({"shape": []}, "0 dimensions"),
        ({"shape": [1] * 10**6}, "1000000 dimensions"),
        ({"shape": [2**31, 2**31, 2**31]}, "takes 39614081257132168796771975168 bytes"),
    ],
)
def test_what_does_not_hold_together_is_refused_in_words(change: dict, word: str) -> None:
    message = encode(torch.zeros(2, 3, 4), torch.float32)
    for name, value in change.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)

    with pytest.raises(TrunkError, match=word):
        decode(message, "activations")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_scale_is_refused(scale: float) -> None:
    message = encode(torch.ones(2, 2), torch.float16)
    message.scale = scale

    with pytest.raises(TrunkError, match="scale"):
        decode(message, "gradient")
