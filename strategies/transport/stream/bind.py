"""Where the trunk's server listens, and what it shows for a certificate."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import grpc

from conf.rules import split_address
from conf.schema import LinkConfig
from strategies.transport.certificates import check_certificate, is_loopback, self_signed


def bind(server: grpc.Server, link: LinkConfig) -> tuple[bytes, int]:
    """Let a server listen on `link.bind`.

    Returns
    -------
    certificate, port : bytes, int
        The PEM that clients are to trust, empty without TLS; and the port.

    Raises
    ------
    ValueError
        If the address cannot be listened on, or the certificate cannot be read.
    """
    secure = is_secure(link)
    certificate, key = _certificate(link, host_of(link)) if secure else (b"", b"")
    try:
        if secure:
            credentials = grpc.ssl_server_credentials([(key, certificate)])
            return certificate, server.add_secure_port(link.bind, credentials)
        return certificate, server.add_insecure_port(link.bind)
    except RuntimeError:  # gRPC's words name neither the address nor the reason
        raise ValueError(
            f"the trunk cannot listen on link.bind={link.bind}: {_reason(link.bind)}. Choose a "
            "free port on an address of this machine, or port 0 for any free one"
        ) from None


def host_of(link: LinkConfig) -> str:
    """What clients connect to, without the port."""
    return (link.advertise or link.bind).rpartition(":")[0].strip("[]")


def is_secure(link: LinkConfig) -> bool:
    """Whether TLS is on."""
    host = link.bind.rpartition(":")[0]
    local = is_loopback(host) and is_loopback(host_of(link))
    return link.tls == "on" or (link.tls == "auto" and not local)


def _certificate(link: LinkConfig, host: str) -> tuple[bytes, bytes]:
    if not link.certificate:
        return self_signed(host)
    try:
        certificate, key = Path(link.certificate).read_bytes(), Path(link.key).read_bytes()
    except OSError as error:
        raise ValueError(
            f"link.certificate or link.key cannot be read: {error}; give absolute paths that "
            "the SuperLink's user can read"
        ) from error
    check_certificate(certificate, key, host.strip("[]"))
    return certificate, key


def _reason(address: str) -> str:
    """Why nothing can listen on an address, in the system's words."""
    host, port = split_address(address)
    taken = f"port {port} is taken by another process"
    try:
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as tried:
                tried.bind(place)
    except OSError as error:
        return taken if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return taken  # by one that shares it with whoever asks as this does
