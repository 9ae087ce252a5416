"""Row 18: tensors say what they are, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.registry import find_codec
from strategies.transport.codec.tensors import (
    check_named,
    decode_changed,
    decode_mask,
    decode_named,
    encode_mask,
    encode_named,
)
from strategies.transport.payload import Parcel, Payload


def there_and_back(
    codec: str | Codec, tensor_BTD: torch.Tensor, mask_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Through a parcel, as a frame carries it, after another tensor of the same frame."""
    name = find_codec(codec)() if isinstance(codec, str) else codec
    parcel = Parcel()
    parcel.put((1,), "other", b"123")
    message = name.encode(tensor_BTD, mask_BT, 0, 0, parcel)
    return name.decode(message, mask_BT, Payload(b"".join(parcel.parts)), "t")


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (4, 7, 2)])
def test_fp32_travels_bit_for_bit(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    tensor[0, 0] = float("inf")

    assert torch.equal(there_and_back("fp32", tensor), tensor)


def test_bf16_is_rounded_once() -> None:
    tensor = torch.randn(2, 3, 8)

    back = there_and_back("bf16", tensor)

    assert back.dtype == torch.bfloat16
    assert torch.equal(back, tensor.bfloat16())


@given(exponent=st.integers(-60, 60))
def test_fp16_keeps_its_precision_at_any_magnitude(exponent: int) -> None:
    """Gradients of 1e-8 underflow in plain fp16: all would arrive as zero."""
    tensor = torch.linspace(0.5, 1.0, 32).view(1, 4, 8) * 2.0**exponent

    assert torch.all((there_and_back("fp16", tensor) - tensor).abs() <= tensor * 2.0**-11)


@pytest.mark.parametrize("value", [0.0, 3e38])
def test_fp16_takes_zeros_and_very_large_numbers(value: float) -> None:
    tensor = torch.full((2, 2, 2), value)

    assert torch.allclose(there_and_back("fp16", tensor), tensor, rtol=1e-3)


@given(st.integers(1, 5), st.integers(1, 19))
def test_a_mask_is_a_bit_a_position(rows: int, columns: int) -> None:
    mask = torch.rand(rows, columns) > 0.5
    mask[0, 0] = True

    data = encode_mask(mask.long())

    assert len(data) == (rows * columns + 7) // 8
    assert torch.equal(decode_mask(data, (rows, columns)), mask)
    assert encode_mask(None) == b""
    assert decode_mask(b"", (rows, columns)) is None


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_travel_and_comes_back_as_zero(codec: str, side: str) -> None:
    """Whatever it held: the rows of tokens come back in their places."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    mask = mask.flip(1) if side == "left" else mask
    tensor = torch.randn(3, 4, 5)
    parcel = Parcel()
    message = find_codec(codec)().encode(tensor, mask, 0, 0, parcel)

    back = there_and_back(codec, tensor.masked_fill(mask[..., None] == 0, float("nan")), mask)

    least, most = find_codec(codec)().sizes(8, 5)
    assert least <= message.size <= most < find_codec(codec)().sizes(12, 5)[0]
    assert list(message.shape) == [3, 4, 5]
    assert torch.allclose(back.float(), tensor * mask[..., None], rtol=1e-2)
    assert torch.equal(back[mask == 0], torch.zeros(4, 5, dtype=back.dtype))


def test_a_non_contiguous_tensor_keeps_its_order() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2)

    assert torch.equal(there_and_back("fp32", tensor), tensor)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"codec": ""}, "codec '' is not known here; known are bf16"),
        ({"codec": "n" * 10**5}, "codec 'nnn"),
        ({"codec": "bf16"}, "bf16 came, fp32 was agreed; start both sides with the same link"),
        ({"shape": [2, 3, 5]}, r"6 positions of 5 in codec fp32 take 120 to 120 bytes, 96 came"),
        ({"shape": [0, 3, 4]}, "shape"),
        ({"shape": []}, "0 dimensions"),
        ({"shape": [6, 4]}, r"\(6, 4\) is not \(B, T, D\)"),
        ({"shape": [1] * 10**6}, "1000000 dimensions"),
        ({"shape": [2**31, 2**31, 2**31]}, "take 39614081257132168796771975168 to"),
        ({"size": 95}, "96 to 96 bytes, 95 came"),
        ({"size": 97}, "its data ends at byte 97 of a payload of 96"),
        ({"offset": 1}, "its data ends at byte 97 of a payload of 96"),
        ({"offset": 2**64 - 1}, "of a payload of 96"),
    ],
)
def test_what_does_not_hold_together_is_refused_in_words(change: dict, word: str) -> None:
    codec, parcel = find_codec("fp32")(), Parcel()
    message = codec.encode(torch.zeros(2, 3, 4), None, 0, 0, parcel)
    for name, value in change.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)

    with pytest.raises(TrunkError, match=word) as refused:
        codec.decode(message, None, Payload(b"".join(parcel.parts)), "activations")
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_scale_is_refused(scale: float) -> None:
    codec, parcel = find_codec("fp16")(), Parcel()
    message = codec.encode(torch.ones(1, 2, 2), None, 0, 0, parcel)
    data = torch.tensor([scale]).numpy().tobytes() + bytes(parcel.parts[0])[4:]

    with pytest.raises(TrunkError, match="scale"):
        codec.decode(message, None, Payload(data), "activations")


@pytest.mark.parametrize(
    ("data", "word"),
    [(b"\xff", r"shape \(3, 4\) takes 2 bytes, 1 came"), (bytes(2), "all positions are padding")],
)
def test_a_wrong_mask_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(TrunkError, match=word):
        decode_mask(data, (3, 4))


def test_named_tensors_travel_bit_for_bit() -> None:
    tensors = {"top.w": torch.randn(3, 2), "top.b": torch.randn(4)}
    parcel = Parcel()

    named = encode_named(tensors, parcel)
    back = decode_named(named, Payload(b"".join(parcel.parts)))

    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    named[0].tensor.codec = "bf16"
    with pytest.raises(TrunkError, match=r"'top.w' came as 'bf16', not as fp32"):
        decode_named(named, Payload(b"".join(parcel.parts)))


SINCE = {"embedding": torch.zeros(10, 4), "w": torch.ones(4, 3), "b": torch.ones(5)}


def changed() -> dict[str, torch.Tensor]:
    """Two rows of the first, nothing of the second, one element of the third."""
    now = {name: tensor.clone() for name, tensor in SINCE.items()}
    now["embedding"][torch.tensor([3, 8])] = torch.randn(2, 4)
    now["b"][2] = 7.0
    return now


def test_what_has_changed_travels_and_nothing_else() -> None:
    now, parcel = changed(), Parcel()

    named = encode_named(now, parcel, SINCE)
    check_named(named, {name: tensor.shape for name, tensor in SINCE.items()})
    back = decode_changed(named, Payload(b"".join(parcel.parts)), SINCE)

    assert {each.name: list(each.rows) for each in named} == {"embedding": [3, 8], "b": []}
    assert sum(map(len, parcel.parts)) == 4 * (2 * 4 + 5)
    assert all(torch.equal({**SINCE, **back}[name], now[name]) for name in now)


def test_most_rows_travel_as_a_whole() -> None:
    now = {"embedding": torch.ones(10, 4)}
    assert not encode_named(now, Parcel(), SINCE)[0].rows


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rows": [3, 10]}, "2 row numbers"),
        ({"rows": [8, 3]}, "2 row numbers"),
        ({"rows": [3, 3]}, "2 row numbers"),
        ({"rows": [3]}, "1 row numbers"),
        ({"rows": []}, r"shape \(2, 4\) and 0 row numbers; it has \(10, 4\)"),
        ({"name": "other"}, "'other' is none of the ends'"),
        ({"rows": [0] * 2**20}, "1048576 row numbers"),
        ({"name": "b"}, "twice"),
    ],
)
def test_changes_that_cannot_be_are_refused(change: dict, word: str) -> None:
    named = encode_named(changed(), Parcel(), SINCE)
    for field, value in change.items():
        named[0].ClearField(field)
        if isinstance(value, list):
            named[0].rows.extend(value)
        else:
            named[0].name = value
    with pytest.raises(TrunkError, match=word):
        check_named(named, {name: tensor.shape for name, tensor in SINCE.items()})


class Counted(list[Any]):
    """What may be counted and not looked into."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("read before it was counted")

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("read before it was counted")


def test_no_more_is_read_of_a_head_than_there_can_be() -> None:
    """Row numbers and messages are as many as the sender likes, in a few bytes each."""
    shapes = {name: tensor.shape for name, tensor in SINCE.items()}
    tensor = pb.Tensor(shape=[2**20, 4], codec="fp32")
    rows: Any = SimpleNamespace(name="embedding", tensor=tensor, rows=Counted([0] * 2**20))
    with pytest.raises(TrunkError, match=r"1048576 row numbers; it has \(10, 4\)"):
        check_named([rows], shapes)
    with pytest.raises(TrunkError, match="4 named tensors came, there are 3"):
        check_named(Counted([pb.NamedTensor()] * 4), shapes)


def test_a_scalar_has_no_rows() -> None:
    named = [pb.NamedTensor(name="s", tensor=pb.Tensor(shape=[1], codec="fp32"), rows=[0])]
    with pytest.raises(TrunkError, match=r"shape \(1,\) and 1 row numbers; it has \(\)"):
        check_named(named, {"s": ()})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_mask_may_be_on_another_device() -> None:
    mask_BT, tensor = torch.tensor([[1, 1, 0]], device="cuda"), torch.randn(1, 3, 4, device="cuda")
    back = there_and_back("fp32", tensor, mask_BT)
    assert torch.equal(back, (tensor * mask_BT[..., None]).cpu())
