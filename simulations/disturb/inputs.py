"""What the fuzzer sends: noise, damaged frames, and frames that were made to hurt.

Everything is drawn from one `random.Random`, so that a seed and a number bring an input back.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import xxhash

from simulations.disturb.wrongs import COUNTS, WRONGS, much_from_little
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.codec import Codec
from strategies.transport.codec.registry import find_codec
from strategies.transport.codec.tensors import encode_mask, encode_named
from strategies.transport.frames import (
    WIRE_VERSION,
    client_frame,
    server_frame,
)
from strategies.transport.payload import Parcel
from strategies.transport.rows import NAME, to_bits, tokens_of

LIMIT = 2**18
"""Largest frame that is sent, bytes; and the limit of the sessions it is sent to."""

TOKENS = (0, 1, 2, 5, 2**31, 2**32, 2**63, 2**64 - 1)
NUMBERS = (
    *(0.0, -0.0, 1.0, -1.0, 1e-45, 1e-310, 1e38, 3.4e38, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
"""Also for 32-bit fields, which round what they cannot hold."""
PATTERNS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x7e\x00\x7c")
"""Of numbers that are none, or the largest, in fp32 and fp16."""
POISON = (float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, 1e20)

CHECKSUM, LENGTH = 8, 4
"""Bytes that a frame begins with."""

_ANSWERS = ("opened", "activations", "gradients", "applied", "closed", "failure", "generated")


def sealed(rest: bytes) -> bytes:
    """A frame whose checksum fits."""
    return xxhash.xxh3_64_intdigest(rest).to_bytes(CHECKSUM, "little") + rest


class Inputs:
    """Draws inputs for a trunk of hidden size D whose wire has this codec."""

    def __init__(
        self,
        chance: random.Random,
        *,
        hidden: int,
        codec: str,
        gradient: bool = False,
        ends: Sequence[str] = (),
    ) -> None:
        self._chance, self._hidden, self._ends = chance, hidden, ends
        self.codec: Codec = find_codec(codec)(gradient=gradient)
        """Of the tensors in what is drawn."""
        self._parcel = Parcel()
        self.named, self.tags = 0.0, list[int]()
        """How many of the frames name their examples, and what both sides have kept of those."""
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
        return sealed(self._bent(raw[CHECKSUM:], other[CHECKSUM:]))

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
        mask_BT = self._mask(B, T) if self._chance.random() < 0.5 else None
        frame = pb.Compute(step=step, micro=micro, mask=encode_mask(mask_BT))
        if self._chance.random() < self.named:
            mask_BT = self._name_rows(frame, B, T, mask_BT)
        if mask_BT is None or mask_BT.any() or not frame.names:
            frame.activations.CopyFrom(self.honest((B, T, self._hidden), mask_BT))
        else:
            empty = self._parcel.put((B, T, self._hidden), self.codec.name, b"")
            frame.activations.CopyFrom(empty)
        return self._numbered(compute=frame)

    def _name_rows(
        self, frame: pb.Compute, B: int, T: int, mask_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """Name a frame's rows, some of them as known; which positions travel."""
        chance = self._chance
        frame.names = b"".join(bytes([chance.choice(b"abc")]) * NAME for _ in range(B))
        known = [chance.random() < 0.3 for _ in range(B)]
        frame.known = to_bits(known)
        frame.tags.extend(chance.choice((0, 1, *self.tags[-4:])) for _ in range(B))
        return tokens_of(mask_BT, B, T) & ~torch.tensor(known)[:, None]

    def _mask(self, B: int, T: int) -> torch.Tensor:
        return torch.tensor([[self._chance.random() < 0.8 for _ in range(T)] for _ in range(B)])

    def _packed(self) -> Parcel:
        """The data of the tensors that were drawn since the last frame."""
        parcel, self._parcel = self._parcel, Parcel()
        return parcel

    def _numbered(self, **body: object) -> bytes:
        """The frame that is due, now and then another; some answers were not seen."""
        number = max(0, self.number + self._chance.choice((0,) * 40 + (1, -1)))
        seen = max(0, number - self._chance.choice((1, 1, 2, 4)))
        return client_frame(self._packed(), **body, number=number, seen=seen)

    def backward(
        self,
        step: int,
        micro: int,
        shape: Sequence[int],
        mask_BT: torch.Tensor | None,
        *,
        last: bool,
        tokens: int,
    ) -> bytes:
        """A gradient that an honest client could send."""
        gradient = self.honest(shape, mask_BT)
        return self._numbered(
            backward=pb.Backward(
                step=step, micro=micro, gradient=gradient, last=last, tokens=tokens
            ),
        )

    def generate(self, number: int, shape: tuple[int, int], **fields: Any) -> bytes:
        """New positions (B, T) that an honest client could send, some of them padding."""
        chance, (B, T) = self._chance, shape
        mask_BT = self._mask(B, T) if chance.random() < 0.3 else None
        h1, mask = self.honest((B, T, self._hidden), mask_BT), encode_mask(mask_BT)
        frame = pb.Generate(number=number, activations=h1, mask=mask, **fields)
        if chance.random() < 0.3:
            frame.positions.extend(chance.randrange(64) for _ in range(B * T))
        return client_frame(self._packed(), generate=frame)

    def apply(
        self, step: int, tokens: int, shapes: dict[str, tuple[int, ...]], square: float = 0.5
    ) -> bytes:
        """The end of a step; `shapes` are those of the ends' gradients, if they travel."""
        frame = pb.Apply(step=step, client_square_norm=square, tokens=tokens, loss=1.0)
        gradients = {name: self._values(shape) for name, shape in shapes.items()}
        frame.gradients.extend(encode_named(gradients, self._parcel))
        return self._numbered(apply=frame)

    def honest(self, shape: Sequence[int], mask_BT: torch.Tensor | None = None) -> pb.Tensor:
        """A tensor as an honest side encodes it; now and then of poisonous values."""
        values = self._values(shape)
        if self._chance.random() < 0.1:
            flat = values.view(-1)
            flat[self._chance.randrange(flat.numel())] = self._chance.choice(POISON)
        if len(shape) != 3:
            return encode_named({"it": values}, self._parcel)[0].tensor
        if mask_BT is not None and not mask_BT.any():
            mask_BT = None
        return self.codec.encode(values, mask_BT, 0, 0, self._parcel)

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
        bodies: tuple[dict[str, Any], ...] = (
            {"opened": pb.Opened(hidden_size=self._hidden, steps=4)},
            {"activations": pb.Activations(step=1, activations=tensor)},
            {"gradients": pb.Gradients(step=1, gradient=tensor, square_norm=2.0)},
            {"applied": pb.Applied(step=1, grad_norm=1.0, lr=1e-3)},
            {"failure": pb.Failure(kind="stale", message="it came again")},
        )
        return server_frame(self._packed(), **self._chance.choice(bodies))

    def tensor(self, shape: Sequence[int] = ()) -> pb.Tensor:
        """A tensor of which something does not hold together."""
        chance = self._chance
        shape = shape or [chance.randint(1, 3), chance.randint(1, 6), self._hidden]
        if chance.random() < 0.25:  # it holds together, and does not fit
            return self.honest(
                [chance.choice((1, 2, 4, 9, 17)) for _ in range(chance.choice((1, 2, 3, 3, 3, 4)))]
            )
        message = self.honest(shape)
        if chance.random() < 0.2:
            self._poison()
        for _ in range(chance.randint(1, 2)):
            chance.choice(WRONGS)(message, chance)
        return message

    def _poison(self) -> None:
        """Put numbers that are none into the data of the last tensor."""
        size = len(self._parcel.parts[-1])
        data = (self._chance.choice(PATTERNS) * size)[:size]
        self._parcel.parts[-1] = memoryview(data)

    def _compute(self, frame: pb.ClientFrame, step: int, micro: int) -> None:
        frame.compute.step, frame.compute.micro = step, micro
        frame.compute.activations.CopyFrom(self.tensor())
        if self._chance.random() < 0.5:
            frame.compute.mask = self._bits()
        frame.compute.frozen = self._chance.random() < 0.2

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
            frame.generate.mask = self._bits()
        if chance.random() < 0.3:
            frame.generate.rows.extend(some() for _ in range(chance.choice((1, 2, 3, 3000))))
        if chance.random() < 0.3:
            frame.generate.positions.extend(some() for _ in range(chance.choice((1, 6, 3000))))
        if chance.random() < 0.2:
            frame.generate.fork = chance.choice(("one/0", "two/0", self._name()))
        frame.generate.drop = chance.random() < 0.2

    def _bits(self) -> bytes:
        """A mask, perhaps of another batch."""
        return self._chance.choice((b"\0", b"\0\0", b"\xff", b"\xfc", b"\xff" * 3, bytes(2**12)))

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
            much_from_little(field.add(name=same or self._name()).tensor, chance)
            field.add(name=field[-1].name).tensor.CopyFrom(self.honest([3, 2]))

    def _name(self, short: bool = False) -> str:
        names = ["", "x", "\0", "n.1\n", "é" * 7, *self._ends]
        if not short and self._chance.random() < 0.15:
            return "n" * self._chance.choice((3000, 10**5))
        return self._chance.choice(names)

    def _mostly(self, right: Any, others: Sequence[Any]) -> Any:
        return right if self._chance.random() < 0.7 else self._chance.choice(others)

    def _sealed(self, frame: pb.ClientFrame | pb.ServerFrame) -> bytes:
        head = frame.SerializeToString()
        if self._chance.random() < 0.1:
            head += self._unknown()
        payload = b"".join(self._packed().parts)
        length = len(head) if self._chance.random() < 0.95 else self._chance.choice(COUNTS)
        return sealed((length.to_bytes(LENGTH, "little") + head + payload)[:LIMIT])

    def _unknown(self) -> bytes:
        """Fields that no message has: a string, or groups inside groups."""
        if self._chance.random() < 0.5:
            return pb.NamedTensor(name="u" * 99).SerializeToString().replace(b"\n", b"\xfa\x07", 1)
        depth = self._chance.choice((3, 90, 120, 5000))
        return b"\xfb\x07" * depth + b"\xfc\x07" * self._chance.choice((depth, 0, 1))
