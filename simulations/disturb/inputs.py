"""What the fuzzer sends: noise, damaged frames, and frames that were made to hurt.

Everything is drawn from one `random.Random`, so that a seed and a number bring an input back.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from google.protobuf.message import DecodeError

from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.tensors import WIRE_VERSION, encode, encode_mask
from strategies.transport.frames import _seal, client_frame, server_frame

LIMIT = 2**18
"""Largest frame that is sent, bytes; and the limit of the sessions it is sent to."""

MOST = 2**32 - 1
COUNTS = (0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, MOST)
TOKENS = (0, 1, 2, 5, 2**31, 2**32, 2**63, 2**64 - 1)
NUMBERS = (
    *(0.0, -0.0, 1.0, -1.0, 1e-45, 1e-310, 1e38, 3.4e38, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
"""Also for 32-bit fields, which round what they cannot hold."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Of the codecs that ship with Graft."""
POISON = (float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, 1e20)

_ANSWERS = ("opened", "activations", "gradients", "applied", "closed", "failure", "generated")


class Inputs:
    """Draws inputs for a trunk of hidden size D whose wire has this dtype."""

    def __init__(
        self, chance: random.Random, *, hidden: int, dtype: torch.dtype, ends: Sequence[str] = ()
    ) -> None:
        self._chance, self._hidden, self._dtype, self._ends = chance, hidden, dtype, ends
        self.number = 1
        """Of the frame that is due in the session that is sent to."""

    def noise(self) -> bytes:
        """Bytes without a meaning."""
        longest = self._chance.choice((1, 16, 256, 4096, LIMIT))
        return self._chance.randbytes(self._chance.randint(0, longest))

    def damaged(self, raw: bytes, other: bytes = b"") -> bytes:
        """A frame that did not arrive as it was sent; sometimes its checksum fits again."""
        if self._chance.random() < 0.5:
            return self._bent(raw, other)
        body, rest = pb.Envelope.FromString(raw).body, other
        if other:
            try:
                rest = pb.Envelope.FromString(other).body
            except DecodeError:
                rest = other
        return _seal(self._bent(body, rest))

    def _bent(self, raw: bytes, other: bytes) -> bytes:
        chance, bent = self._chance, bytearray(raw)
        way = chance.choice(("flip", "flip", "cut", "insert", "splice", "repeat"))
        at = chance.randint(0, len(bent))
        if way == "flip":
            for _ in range(chance.choice((1, 1, 2, 16)) if bent else 0):
                bent[chance.randrange(len(bent))] ^= 1 << chance.randrange(8)
        elif way == "cut":
            del bent[at:]
        elif way == "insert":
            bent[at:at] = chance.randbytes(chance.choice((1, 4, 64)))
        elif way == "splice":
            bent[at:] = other[chance.randint(0, len(other)) :]
        else:
            bent += bent[at:]
        return bytes(bent[:LIMIT])

    def compute(self, step: int, micro: int) -> bytes:
        """A frame that an honest client could send."""
        B, T = self._chance.randint(1, 3), self._chance.randint(1, 6)
        frame = pb.Compute(step=step, micro=micro, activations=self.honest((B, T, self._hidden)))
        if self._chance.random() < 0.5:
            mask = [[self._chance.random() < 0.8 for _ in range(T)] for _ in range(B)]
            frame.mask.CopyFrom(encode_mask(torch.tensor(mask)))
        return self._numbered(compute=frame)

    def backward(
        self, step: int, micro: int, shape: Sequence[int], *, last: bool, tokens: int
    ) -> bytes:
        """A gradient that an honest client could send."""
        gradient = self.honest(shape)
        return self._numbered(
            backward=pb.Backward(
                step=step, micro=micro, gradient=gradient, last=last, tokens=tokens
            )
        )

    def generate(self, number: int, shape: tuple[int, int], **fields: Any) -> bytes:
        """New positions (B, T) that an honest client could send, some of them padding."""
        chance, (B, T) = self._chance, shape
        frame = pb.Generate(number=number, activations=self.honest((B, T, self._hidden)), **fields)
        if chance.random() < 0.3:
            mask = [[chance.random() < 0.8 for _ in range(T)] for _ in range(B)]
            frame.mask.CopyFrom(encode_mask(torch.tensor(mask)))
        if chance.random() < 0.3:
            frame.positions.extend(chance.randrange(64) for _ in range(B * T))
        return client_frame(generate=frame)

    def apply(
        self, step: int, tokens: int, shapes: dict[str, tuple[int, ...]], square: float = 0.5
    ) -> bytes:
        """The end of a step; `shapes` are those of the ends' gradients, if they travel."""
        frame = pb.Apply(step=step, client_square_norm=square, tokens=tokens, loss=1.0)
        for name, shape in shapes.items():
            tensor = encode(self._values(shape), torch.float32)
            frame.gradients.append(pb.NamedTensor(name=name, tensor=tensor))
        return self._numbered(apply=frame)

    def _numbered(self, **body: object) -> bytes:
        """The frame that is due, now and then another; some answers were not seen."""
        number = max(0, self.number + self._chance.choice((0,) * 40 + (1, -1)))
        return client_frame(
            **body, number=number, seen=max(0, number - self._chance.choice((1, 1, 2, 4)))
        )

    def honest(self, shape: Sequence[int]) -> pb.Tensor:
        """A tensor as an honest side encodes it; now and then of poisonous values."""
        values = self._values(shape)
        if self._chance.random() < 0.1:
            flat = values.view(-1)
            flat[self._chance.randrange(flat.numel())] = self._chance.choice(POISON)
        return encode(values, self._dtype)

    def _values(self, shape: Sequence[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._chance.getrandbits(32))
        return torch.randn(tuple(shape), generator=generator)

    def hostile(self, step: int, micro: int) -> bytes:
        """A whole client frame that no client of ours would send."""
        frame = pb.ClientFrame(version=self._mostly(WIRE_VERSION, COUNTS))
        makes = (self._compute, self._backward, self._again, self._apply, self._generate)
        make = self._chance.choice(makes)
        if self._chance.random() < 0.07:
            frame.close.early = self._chance.random() < 0.5
        else:
            make(frame, self._mostly(step, COUNTS), self._mostly(micro, COUNTS))
            frame.number = self.number
            if self._chance.random() < 0.1:
                frame.number = self._chance.choice((0, self.number - 1, *TOKENS))
            frame.seen = self._mostly(self.number - 1, TOKENS)
        return self._sealed(frame)

    def hostile_answer(self) -> bytes:
        """A whole trunk frame that no trunk of ours would send."""
        chance, any_count = self._chance, self._chance.choice
        frame = pb.ServerFrame(version=self._mostly(WIRE_VERSION, COUNTS))
        body = chance.choice(_ANSWERS)
        part: Any = getattr(frame, body)
        part.SetInParent()
        if body == "opened":
            part.hidden_size, part.steps = any_count(COUNTS), any_count(COUNTS)
        elif body == "closed":
            part.steps, part.tokens = any_count(COUNTS), any_count(TOKENS)
        elif body == "failure":
            part.kind, part.message = self._name(), self._name()
        elif body == "generated":
            part.number, part.seconds = any_count(TOKENS), any_count(NUMBERS)
            part.activations.CopyFrom(self.tensor())
        else:
            part.step, part.seconds = any_count(COUNTS), any_count(NUMBERS)
            if body == "applied":
                part.grad_norm = any_count(NUMBERS)
                self._name_tensors(part.state)
            else:
                name = "activations" if body == "activations" else "gradient"
                getattr(part, name).CopyFrom(self.tensor())
        return self._sealed(frame)

    def honest_answer(self) -> bytes:
        """A trunk frame as the trunk sends it."""
        tensor = self.honest((2, 3, self._hidden))
        return self._chance.choice(
            (
                server_frame(opened=pb.Opened(hidden_size=self._hidden, steps=4)),
                server_frame(activations=pb.Activations(step=1, activations=tensor)),
                server_frame(gradients=pb.Gradients(step=1, gradient=tensor, square_norm=2.0)),
                server_frame(applied=pb.Applied(step=1, grad_norm=1.0, lr=1e-3)),
                server_frame(failure=pb.Failure(kind="stale", message="it came again")),
            )
        )

    def tensor(self, shape: Sequence[int] = ()) -> pb.Tensor:
        """A tensor of which something does not hold together."""
        chance = self._chance
        shape = shape or [chance.randint(1, 3), chance.randint(1, 6), self._hidden]
        if chance.random() < 0.25:  # it holds together, and does not fit
            return self.honest(
                [chance.choice((1, 2, 4, 9, 17)) for _ in range(chance.randint(1, 4))]
            )
        message = self.honest(shape)
        for _ in range(chance.randint(1, 2)):
            chance.choice(_WRONGS)(message, chance)
        return message

    def _compute(self, frame: pb.ClientFrame, step: int, micro: int) -> None:
        frame.compute.step, frame.compute.micro = step, micro
        frame.compute.activations.CopyFrom(self.tensor())
        if self._chance.random() < 0.5:
            frame.compute.mask.CopyFrom(self.tensor([2, 3]))

    def _backward(self, frame: pb.ClientFrame, step: int, micro: int) -> None:
        frame.backward.step, frame.backward.micro = step, micro
        frame.backward.gradient.CopyFrom(self.tensor())
        frame.backward.last = self._chance.random() < 0.5
        frame.backward.tokens = self._chance.choice(TOKENS)

    def _generate(self, frame: pb.ClientFrame, number: int, length: int) -> None:
        chance, some = self._chance, lambda: self._chance.choice(COUNTS)
        frame.generate.number, frame.generate.length = self._mostly(number + 1, TOKENS), length
        frame.generate.activations.CopyFrom(self.tensor())
        if chance.random() < 0.3:
            frame.generate.mask.CopyFrom(self.tensor([2, 3]))
        if chance.random() < 0.3:
            frame.generate.rows.extend(some() for _ in range(chance.choice((1, 2, 3, 3000))))
        if chance.random() < 0.3:
            frame.generate.positions.extend(some() for _ in range(chance.choice((1, 6, 3000))))
        if chance.random() < 0.2:
            frame.generate.fork = chance.choice(("one/0", "two/0", self._name()))
        frame.generate.drop = chance.random() < 0.2

    def _again(self, frame: pb.ClientFrame, step: int, micro: int) -> None:
        frame.get_gradients.step, frame.get_gradients.micro = step, micro

    def _apply(self, frame: pb.ClientFrame, step: int, micro: int) -> None:
        frame.apply.step = step
        frame.apply.client_square_norm = self._mostly(0.5, NUMBERS)
        frame.apply.tokens = self._mostly(1, TOKENS)
        frame.apply.loss = self._chance.choice(NUMBERS)
        frame.apply.seconds_top = self._chance.choice(NUMBERS)
        if self._chance.random() < 0.5:
            self._name_tensors(frame.apply.gradients)

    def _name_tensors(self, field: Any) -> None:
        chance = self._chance
        count = chance.choice((1, 1, 2, 3, 3000))
        same = self._name(count > 3) if chance.random() < 0.3 else None
        for _ in range(count):
            each = field.add(name=same if same is not None else self._name(count > 3))
            if count <= 3:
                each.tensor.CopyFrom(self.tensor(chance.choice(([3, 2], [4], [1]))))
        if chance.random() < 0.2:  # hidden behind a later one of the same name
            _much_from_little(field.add(name=same or self._name()).tensor, chance)
            field.add(name=field[-1].name).tensor.CopyFrom(self.honest([3, 2]))

    def _name(self, short: bool = False) -> str:
        names = ["", "x", "\0", "n.1\n", "é" * 7, *self._ends]
        if not short and self._chance.random() < 0.15:
            return "n" * self._chance.choice((3000, 10**5))
        return self._chance.choice(names)

    def _mostly(self, right: Any, others: Sequence[Any]) -> Any:
        return right if self._chance.random() < 0.7 else self._chance.choice(others)

    def _sealed(self, frame: pb.ClientFrame | pb.ServerFrame) -> bytes:
        body = frame.SerializeToString()
        if self._chance.random() < 0.1:
            body += self._unknown()
        return _seal(body[:LIMIT])

    def _unknown(self) -> bytes:
        """Fields that no message has: a string, or groups inside groups."""
        if self._chance.random() < 0.5:
            return pb.NamedTensor(name="u" * 99).SerializeToString().replace(b"\n", b"\xfa\x07", 1)
        depth = self._chance.choice((3, 90, 120, 5000))
        return b"\xfb\x07" * depth + b"\xfc\x07" * self._chance.choice((depth, 0, 1))


def _wrong_shape(message: pb.Tensor, chance: random.Random) -> None:
    del message.shape[:]
    dims = chance.choice((0, 1, 2, 3, 3, 3, 4, 5, 3000))
    message.shape.extend(chance.choice(COUNTS) for _ in range(dims))


def _one_wrong_dimension(message: pb.Tensor, chance: random.Random) -> None:
    if message.shape:
        message.shape[chance.randrange(len(message.shape))] = chance.choice(COUNTS)


def _wrong_type(message: pb.Tensor, chance: random.Random) -> None:
    message.dtype, message.codec = chance.choice((0, 1, 2, 3, 4, 99)), chance.choice((0, 1, 2, 3))  # type: ignore[assignment]


def _wrong_name(message: pb.Tensor, chance: random.Random) -> None:
    message.codec_name = chance.choice(("fp32", "no such codec", "\0", "n" * 3000))


def _wrong_scale(message: pb.Tensor, chance: random.Random) -> None:
    scale = chance.choice(NUMBERS)
    message.scale = scale if abs(scale) < 3.4e38 or scale != scale else 3.4e38


def _wrong_length(message: pb.Tensor, chance: random.Random) -> None:
    message.data = chance.choice((b"", message.data[:-1], message.data + b"\0", message.data[:4]))


def _poisonous(message: pb.Tensor, chance: random.Random) -> None:
    patterns = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x7e\x00\x7c")
    message.data = (chance.choice(patterns) * len(message.data))[: len(message.data)]


def _wrong_version(message: pb.Tensor, chance: random.Random) -> None:
    message.version = chance.choice(COUNTS)


def _much_from_little(message: pb.Tensor, chance: random.Random) -> None:
    """A mask that holds together and takes 16 times its bytes."""
    size = chance.choice((2**10, 2**14, 2**17))
    del message.shape[:]
    message.shape.extend(chance.choice(([8, size], [1, size, 8], [8 * size])))
    message.version, message.dtype, message.codec = WIRE_VERSION, pb.BOOL, pb.BITS
    message.data = bytes(size)


_WRONGS: tuple[Callable[[pb.Tensor, random.Random], None], ...] = (
    _wrong_shape,
    _one_wrong_dimension,
    _wrong_type,
    _wrong_name,
    _wrong_scale,
    _wrong_length,
    _poisonous,
    _wrong_version,
    _much_from_little,
)
