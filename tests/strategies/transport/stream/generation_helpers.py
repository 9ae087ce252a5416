"""What the tests of generation over the stream share: an engine one can compute by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import grpc
import torch
from torch import Tensor

from conf.schema import LinkConfig
from strategies.errors import TrunkError
from strategies.generation.memory import Limits, Memory
from strategies.transport.stream.generation import GenerationService, Invited, Offer, Policy
from strategies.transport.stream.remote import Place, StreamSession, StreamTrunk
from strategies.transport.tickets import Ticket, new_key, new_nonce, public_half

D = 4
TRUNK_KEY, CLIENT_KEY, NONCE = new_key(), new_key(), new_nonce()
INVITED = Invited(public_key=public_half(CLIENT_KEY), nonce=NONCE)


class SumEngine:
    """A trunk whose output is the sum of all real positions so far, so that a wrong cache shows."""

    hidden_size = D

    def __init__(self, **limits: object) -> None:
        self.limits = Limits(**{"tokens": 4, **limits})  # type: ignore[arg-type]
        self.memory = Memory(self.limits)
        self.sessions: dict[str, SumSession] = {}
        self.forwards, self.forks = 0, 0
        self.lock = threading.Lock()

    def open(self, name: str, *, fork: str = "") -> SumSession:
        if fork and fork not in self.sessions:
            raise TrunkError("not there", kind="gone")
        self.forks += bool(fork)
        held_BLD = self.sessions[fork].held_BLD.clone() if fork else torch.zeros(0, 0, D)
        self.sessions[name] = SumSession(self, name, held_BLD)
        return self.sessions[name]

    def close(self, name: str) -> None:
        if (session := self.sessions.pop(name, None)) is not None:
            self.memory.leave(session)


class SumSession:
    """One cache of a `SumEngine`: what came, with padding as zeros."""

    def __init__(self, engine: SumEngine, name: str, held_BLD: Tensor) -> None:
        self.engine, self.name, self.held_BLD = engine, name, held_BLD
        self.used, self.queued = time.monotonic(), 0.0

    @property
    def bytes(self) -> int:
        return self.held_BLD.numel() * 4

    def give_way(self) -> bool:
        self.held_BLD = torch.zeros(0, 0, D)
        return True

    def check_shape(self, shape: tuple[int, ...], rows: int, length: int) -> None:
        if shape[2] != D or shape[1] > self.engine.limits.tokens:
            raise TrunkError(f"a bad shape, {shape}", kind="shape")
        if length > self.held_BLD.shape[1]:
            raise TrunkError("so much is not there", kind="gone")

    def forward(
        self,
        h_BTD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        rows: Sequence[int] = (),
        length: int = 0,
        keep: bool = True,
    ) -> Tensor:
        with self.engine.lock:
            self.engine.forwards += 1
            before = self.held_BLD[list(rows)] if rows else self.held_BLD
            before = before[:, :length] if length else torch.zeros(h_BTD.shape[0], 0, D)
            new = h_BTD if mask_BT is None else h_BTD * mask_BT[..., None]
            if positions_BT is not None:
                new = new + positions_BT[..., None]
            every = torch.cat([before, new], 1)
            if keep:
                self.engine.memory.take(self, every.numel() * 4)
                self.held_BLD = every
            self.used = time.monotonic()
            return every.cumsum(1)[:, length:].contiguous()


class Near:
    """A session of the engine in this process, which the one far away is compared with."""

    def __init__(self) -> None:
        self.session = SumEngine(tokens=99).open("near")

    def forward(self, h_BTD: Tensor, **how: object) -> Tensor:
        return self.session.forward(h_BTD, **how)  # type: ignore[arg-type]


def link(**changes: object) -> LinkConfig:
    """Short deadlines."""
    return LinkConfig(**{"timeout": 20.0, "grace": 5.0, **changes})  # type: ignore[arg-type]


@contextmanager
def serving(
    *engines: SumEngine,
    policy: Policy | None = None,
    invited: dict[str, Invited] | None = None,
    **changes: object,
) -> Iterator[GenerationService]:
    """Engines as models `a`, `b`, ... behind real gRPC."""
    names = "abc"[: len(engines)]
    service = GenerationService(
        {n: Offer(engine=e, fingerprint=f"of-{n}") for n, e in zip(names, engines, strict=True)},
        invited or {"one": INVITED},
        link(**changes),
        key=TRUNK_KEY,
        policy=policy,
    )
    service.start()
    try:
        yield service
    finally:
        service.stop()


def place(service: GenerationService, **changes: object) -> Place:
    """Where the service is, for client `one`."""
    ticket = Ticket(
        session="",
        address=service.address,
        nonce=NONCE,
        trunk_key=public_half(TRUNK_KEY),
        certificate=service.certificate,
    )
    right = Place(
        ticket=ticket, client="one", key=CLIENT_KEY, model="a", fingerprint="of-a", link=link()
    )
    return replace(right, **changes)  # type: ignore[arg-type]


def opened(service: GenerationService, **changes: object) -> StreamSession:
    """A session of client `one`."""
    return StreamTrunk(place(service, **changes)).open()


def numbers(seed: int, rows: int = 2, width: int = 3) -> Tensor:
    """Activations that add up without rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 9, (rows, width, D), generator=generator).float()


class Watch(grpc.StreamStreamClientInterceptor):
    """Keeps all frames that a client sends, and may change or lose some of either way."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.lose_answers = 0

    def intercept_stream_stream(self, continuation, details, requests):  # type: ignore[no-untyped-def]
        def noted() -> Iterator[bytes]:
            for raw in requests:
                self.sent.append(raw)
                yield raw

        return self._answers(continuation(details, noted()))

    def _answers(self, call):  # type: ignore[no-untyped-def]
        first = True
        for raw in call:
            if not first and self.lose_answers:
                self.lose_answers -= 1
                continue
            first = False
            yield raw
