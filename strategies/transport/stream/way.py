"""One session of generation on a server, as its client has it: calls in, answers out.

Legend: B rows, T new positions, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import grpc
import torch

from conf.rules import ConfigError
from conf.schema import LinkConfig
from models.elsewhere import Crossed
from strategies.engine.checks import check_finite
from strategies.errors import TrunkError
from strategies.generation.session import OVERFLOW
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import crossings
from strategies.transport.codec.tensors import encode_mask, shape_of
from strategies.transport.frames import client_frame
from strategies.transport.generating import seed_of
from strategies.transport.history import Call
from strategies.transport.link import Request
from strategies.transport.payload import Parcel
from strategies.transport.stream.asking import Asking
from strategies.transport.stream.connection import Connection, Words
from strategies.transport.tickets import Ticket

OVERHEAD = 2**14
"""More bytes than a frame holds besides its tensors' elements and positions."""

POSITION_BYTES = 5
"""Of one position on the wire, at most."""

SERVING = Words(
    lost="{seconds:g} s did not bring it back; the server has stopped or cannot be reached. What "
    "was said so far is kept here: try again",
    unreachable="check that `graft serve` runs there, that this machine can reach the address "
    "(graft serve --advertise), and that the port is open",
    breaks=logging.INFO,
)


class Way(Asking):
    """A session on the trunk, from its first stream to its good-bye.

    Parameters
    ----------
    ticket : Ticket
        Where the trunk is, and the session's name, which no session may have had.
    key : bytes
        The client's private key.
    link : LinkConfig
        Deadlines, and the largest frame on this side; the trunk says what it takes.
    extra : sequence
        Metadata of the session: which model.
    interceptors : sequence
        gRPC's, for whoever wants to watch or disturb the frames.

    Attributes
    ----------
    cache_bytes, queued
        As the trunk's last answer says: what the session takes there, and the seconds that the call
        waited for its turn.

    Raises
    ------
    TrunkError
        In words, when the trunk cannot be reached or refuses.
    """

    def __init__(
        self,
        *,
        ticket: Ticket,
        key: bytes,
        link: LinkConfig,
        extra: Sequence[tuple[str, str]] = (),
        interceptors: Sequence[grpc.StreamStreamClientInterceptor] = (),
    ) -> None:
        connection = Connection(
            ticket,
            key,
            steps=0,
            config=link,
            interceptors=interceptors,
            extra=extra,
            words=SERVING,
        )
        limit = int(link.max_frame_mb * 2**20)
        super().__init__(connection, timeout=link.timeout, limit=limit, too_large="its limit")
        self.session, self._number = ticket.session, 0
        self.cache_bytes, self.queued = 0, 0.0
        opened = self.open(link.grace)
        try:
            self._codecs = crossings(opened.codecs, seed_of(ticket.session))
        except ConfigError as error:
            self.abort()
            raise TrunkError(f"the trunk's codec: {error}", kind="codec") from error
        self._limit = min(self._limit, opened.limit)
        self._too_large = f"the largest that the trunk takes, {self._limit / 2**20:g} MiB"
        self._hidden, self._chunk = opened.hidden_size, max(1, opened.chunk)

    def forward(self, call: Call, fork: str = "") -> Crossed:
        """Send a call, in pieces that fit the trunk's frames, and wait for its answer."""
        up, down, seconds = self.bytes_up, self.bytes_down, self.trunk_seconds
        if call.h_BTD.shape[2] != self._hidden:
            raise TrunkError(
                f"this client's hidden size is {call.h_BTD.shape[2]}, the trunk's {self._hidden}: "
                "its ends are of another model",
                kind="model",
            )
        pieces = list(call.split(self._width(call)))
        answers = []
        for piece in pieces:
            answers.append(self._asked_for(piece, fork))
            fork = ""
        return Crossed(
            answers[0] if len(answers) == 1 else torch.cat(answers, 1),
            seconds=self.trunk_seconds - seconds,
            bytes_up=self.bytes_up - up,
            bytes_down=self.bytes_down - down,
            trips=len(answers),
        )

    def _width(self, call: Call) -> int:
        """Positions of each row that go in one frame."""
        rows, _, hidden = call.h_BTD.shape
        each = rows * (self._codecs.most_bytes(hidden, hidden) + POSITION_BYTES + 1)
        return max(1, min(self._chunk, (self._limit - OVERHEAD) // each))

    def _asked_for(self, call: Call, fork: str) -> torch.Tensor:
        """One frame there and back."""
        self._number += 1
        parcel, mask_BT = Parcel(), call.mask_BT
        h1 = self._codecs.h1.encode(call.h_BTD, mask_BT, self._number, 0, parcel)
        frame = pb.Generate(
            number=self._number,
            length=call.length,
            rows=call.rows,
            activations=h1,
            mask=encode_mask(mask_BT),
            fork=fork,
            drop=not call.keep,
        )
        if call.positions_BT is not None:
            frame.positions.extend(call.positions_BT.reshape(-1).tolist())
        raw, shape = client_frame(parcel, generate=frame), tuple(call.h_BTD.shape)
        self.send(Request(raw, "generated", number=self._number, shape=shape, mask_BT=mask_BT))
        return self._read(self.answer("generated"))

    def _read(self, answered: Request) -> torch.Tensor:
        what, reply, shape = "the trunk's output", answered.reply, answered.shape
        with self._ending_in_words():
            if (came := shape_of(reply.activations, what)) != shape:
                raise TrunkError(f"{what} came with shape {came}, sent was {shape}", kind="shape")
            mask_BT, payload = answered.mask_BT, answered.payload
            h_BTD = self._codecs.h2.decode(reply.activations, mask_BT, payload, what)
            check_finite(h_BTD, what, advice=OVERFLOW)
            self.cache_bytes, self.queued = reply.cache_bytes, reply.queued
            return h_BTD
