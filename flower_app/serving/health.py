"""Whether a server serves, for whoever asks by `grpc.health.v1`; no token is needed for it."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2 as pb

NAMES = ("", "graft.Trunk")
"""The server, and its one service."""


class Health:
    """Answers `Check` alone: a `Watch` stays open, and strangers could take all streams with it."""

    def __init__(self) -> None:
        self.serving = False

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server answers with."""
        check = grpc.unary_unary_rpc_method_handler(
            self._check,
            request_deserializer=pb.HealthCheckRequest.FromString,
            response_serializer=pb.HealthCheckResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})

    def _check(
        self, request: pb.HealthCheckRequest, context: grpc.ServicerContext
    ) -> pb.HealthCheckResponse:
        if request.service not in NAMES:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return pb.HealthCheckResponse()
        kinds = pb.HealthCheckResponse
        return kinds(status=kinds.SERVING if self.serving else kinds.NOT_SERVING)
