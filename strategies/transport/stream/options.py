"""What both ends of the stream agree on, and how gRPC is told of it."""

from __future__ import annotations

from strategies.deadlines import keepalive

METHOD = "/graft.Trunk/Session"

SESSION_KEY, TOKEN_KEY = "graft-session", "graft-token"
CONNECTION_KEY, STEPS_KEY = "graft-connection", "graft-steps"
"""A connection's metadata: which session, what proves that it is the client's, the number of the
connection, from 1, and the optimizer steps the session plans."""

MODEL_KEY, FINGERPRINT_KEY = "graft-model", "graft-fingerprint"
"""Of a session that generates: with which of the models served, and what its client's ends are of.
"""

MAX_STREAMS = 256
"""Streams that a trunk serves at once; each takes a thread while it is open."""

HANDSHAKE_SECONDS = 10
"""For TLS and HTTP/2 at the beginning of a connection."""

Options = list[tuple[str, int]]


def server_options(limit: int, grace: float) -> Options:
    """gRPC's options of the trunk: frames of at most `limit` bytes, dead connections noticed."""
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        # Before a token is shown, a stranger costs little and not for long.
        ("grpc.max_concurrent_streams", 8),
        ("grpc.max_metadata_size", 4096),
        ("grpc.absolute_max_metadata_size", 8192),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        ("grpc.max_connection_idle_ms", 60_000),
        # Clients try their connections as often as the trunk does.
        ("grpc.http2.min_ping_interval_without_data_ms", 500),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.http2.max_ping_strikes", 0),
        *_keepalive(grace),
    ]


def client_options(limit: int, grace: float) -> Options:
    """gRPC's options of a client."""
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", -1),
        # A proxy from the environment would see activations that are meant for the trunk only.
        ("grpc.enable_http_proxy", 0),
        # A connection that could not be made must not slow down the next attempt.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        *_keepalive(grace),
    ]


def _keepalive(grace: float) -> Options:
    interval = int(keepalive(grace) * 1000)
    return [
        ("grpc.keepalive_time_ms", interval),
        ("grpc.keepalive_timeout_ms", interval),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
