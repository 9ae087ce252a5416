"""A session over gRPC, as its client has it."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from torch import Tensor

from conf.schema import LinkConfig
from strategies.engine.lane import StepResult
from strategies.transport import trunk_pb2 as pb
from strategies.transport.cache import Cache
from strategies.transport.codec.registry import check_codecs
from strategies.transport.frames import client_frame
from strategies.transport.link import Framed, Request
from strategies.transport.stream.asking import Asking
from strategies.transport.stream.connection import Connection
from strategies.transport.tickets import Ticket

FIRST_CONNECTION_SECONDS = 30.0
"""For a session's first stream, which may need the trunk to be copied."""


class GrpcLink(Asking, Framed):
    """A session of training or evaluation over gRPC.

    If the answer to a `Backward` is long in coming it is asked for with `GetGradients`, which saves
    sending the gradient again.

    Parameters
    ----------
    ticket : Ticket
        Where the trunk is, and which session to open.
    node_key : bytes
        This node's private key, without which the ticket is of no use.
    steps : int
        Optimizer steps planned for this session; 0 to evaluate.
    config : LinkConfig
        Wire dtype, limits and deadlines.
    interceptors : sequence
        gRPC's, for whoever wants to watch or disturb the frames.
    cache : Cache, optional
        Of the activations of this client's examples.

    Raises
    ------
    TrunkError
        In words, when the trunk cannot be reached, refuses, or does not answer in time.
    """

    def __init__(
        self,
        ticket: Ticket,
        node_key: bytes,
        *,
        steps: int,
        config: LinkConfig,
        interceptors: Sequence[grpc.StreamStreamClientInterceptor] = (),
        cache: Cache | None = None,
    ) -> None:
        connection = Connection(
            ticket, node_key, steps=steps, config=config, interceptors=interceptors
        )
        Framed.__init__(self, config, ticket.seed, cache)
        Asking.__init__(
            self,
            connection,
            timeout=config.timeout,
            limit=int(config.max_frame_mb * 2**20),
            too_large=f"link.max_frame_mb={config.max_frame_mb:g}; raise it, or lower "
            "train.batch_size or data.context",
        )
        opened = self.open(min(FIRST_CONNECTION_SECONDS, config.timeout))
        self.hidden_size = opened.hidden_size
        with self._ending_in_words():
            check_codecs(config.codec, opened.codecs)
            if self.cache:
                self.cache.begin(opened)

    def computed(self) -> Tensor:
        """Wait for the trunk's output h2, on the CPU."""
        answer = self._next("activations")
        with self._ending_in_words():
            return self.read_activations(answer)

    def gradients(self) -> tuple[Tensor | None, float]:
        """Wait for dL/dh1, on the CPU, and the squared norm of the trunk's gradient."""
        answer = self._next("gradients")
        with self._ending_in_words():
            return self.read_gradients(answer)

    def applied(self) -> StepResult:
        """Wait for the result of the optimizer step."""
        answer = self._next("applied")
        with self._ending_in_words():
            return self.read_applied(answer)

    def _next(self, kind: str) -> Request:
        answer = self.answer(kind)
        self.taken += 1
        return answer

    def _put_again(self, request: Request) -> None:
        if request.answer == "gradients":
            question = pb.GetGradients(step=request.step, micro=request.micro)
            self._put(client_frame(get_gradients=question, number=request.number))
        else:
            self._put(request.raw)
