"""What a frame and a codec cost this machine: milliseconds for each MB of fp32, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conf.schema import LinkConfig
from conf.sections.link import read_codecs
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import codecs, crossings
from strategies.transport.frames import read_client_frame
from strategies.transport.link import Framed, Request
from strategies.transport.payload import Parcel, Payload

WIDTH = 1024
_MB = 1e6


class _Kept(Framed):
    """A link that keeps the frame it would send."""

    raw: bytes

    def send(self, request: Request) -> None:
        self.raw = request.raw


def bench_frames(megabytes: float = 16.8, repeats: int = 7) -> dict[str, Any]:
    """Build and read a frame of activations; encode and decode a tensor with each codec.

    Parameters
    ----------
    megabytes : float
        Of the tensor in fp32, 10^6 bytes; normal random numbers of width 1024.
    repeats : int
        Of which the median is told, after one that warms up.

    Returns
    -------
    dict
        `frame`: milliseconds to build a `Compute` frame of fp32 from its tensor, and to make a
        tensor of it again. Of each codec: milliseconds per MB of fp32, and bits per element.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = max(1, round(megabytes * _MB / 4 / WIDTH))
        h_BTD = torch.randn((1, rows, WIDTH), generator=torch.Generator().manual_seed(0))
        size = 4 * h_BTD.numel() / _MB
        frame = _frame(h_BTD, repeats)
        kinds = {name: _codec(name, h_BTD, repeats) for name in codecs()}
    finally:
        torch.set_num_threads(before)
    return {
        "benchmark": "frames",
        "megabytes": round(size, 2),
        "threads": 1,
        "repeats": repeats,
        "frame_build_ms": round(frame[0], 2),
        "frame_read_ms": round(frame[1], 2),
        "frame_ms": round(sum(frame), 2),
        **{
            name: {
                "encode_ms_per_mb": round(encode / size, 3),
                "decode_ms_per_mb": round(decode / size, 3),
                "gradient_encode_ms_per_mb": round(gradient / size, 3),
                "bits_per_element": round(8 * weight / h_BTD.numel(), 3),
            }
            for name, (encode, decode, gradient, weight) in kinds.items()
        },
    }


def _frame(h_BTD: Tensor, repeats: int) -> tuple[float, float]:
    """Milliseconds to build and to read a frame of it."""
    link = _Kept(LinkConfig(), 0)
    there = crossings(read_codecs("fp32"), 0).h1
    build = _ms(lambda number: link.compute(number, 0, h_BTD, None), repeats)

    def read(_: int) -> Tensor:
        head, payload = read_client_frame(link.raw)
        return there.decode(head.compute.activations, None, payload, "h1")

    return build, _ms(read, repeats)


def _codec(name: str, h_BTD: Tensor, repeats: int) -> tuple[float, float, float, float]:
    """Milliseconds to encode and to decode it, to encode it as a gradient, and its bytes."""
    here, there = (crossings(read_codecs(name), 0) for _ in range(2))
    sent: dict[int, tuple[pb.Tensor, Payload]] = {}

    def encode(number: int) -> None:
        parcel = Parcel()
        message = here.h1.encode(h_BTD, None, number, 0, parcel)
        sent[number] = message, Payload(parcel.parts[0])

    def decode(number: int) -> None:
        message, payload = sent[number]
        there.h1.decode(message, None, payload, "h1")

    def gradient(number: int) -> None:
        here.grad_h2.encode(h_BTD, None, number, 0, Parcel())

    encoding, decoding, back = (_ms(each, repeats) for each in (encode, decode, gradient))
    return encoding, decoding, back, statistics.median(each.size for each, _ in sent.values())


def _ms(work: Callable[[int], object], repeats: int) -> float:
    """The median of so many calls, numbered from 0; the first is not counted."""
    taken = []
    for number in range(repeats + 1):
        started = time.perf_counter()
        work(number)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken[1:])
