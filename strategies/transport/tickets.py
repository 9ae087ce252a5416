"""Who may open a session: a secret between the trunk and one node, and tokens that serve once.

The Flower message that asks a client brings a ticket. A ticket alone opens nothing: the secret of a
session is agreed between the trunk's key of this run and a key that the node made for itself and
keeps, so that whoever copies the ticket on its way, or out of the SuperLink's database, lacks half
of it. Every connection, the first and each later one, proves the secret with a token of its own,
which is good for that connection only.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from models import Cut

KEY_BYTES = 32
"""Of an X25519 key, a nonce, a secret and a token."""

MAX_CONNECTIONS = 2**31
"""Connections of one session are numbered below this."""


@dataclass(frozen=True, kw_only=True)
class Guest:
    """Whom the trunk admits to a session."""

    key: str
    """The session's name on the server; it differs in every round, attempt and purpose."""
    client: str
    """The client's stable name, which seeds the trunk's dropout."""
    public_key: bytes = b""
    """The node's, as it told when it was asked who it is; not needed without a stream."""
    cut: Cut | None = None
    """The client's own cut, if it is not the trunk's."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a client is told of the session it may open. Useless without the node's own key."""

    session: str
    address: str = ""
    """``host:port`` of the trunk service; empty: the session goes by Flower's messages."""
    nonce: bytes = b""
    """256 random bits, for this session only."""
    trunk_key: bytes = b""
    """The trunk's public key."""
    seed: int = 0
    """What the session's codecs draw from."""
    certificate: bytes = b""
    """PEM to trust; empty means plaintext (loopback)."""

    def as_record(self) -> dict[str, str | bytes | int]:
        """The fields of a `ConfigRecord`."""
        return dict(vars(self))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Ticket:
        """Read `as_record`; other fields of the record are left alone."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})


def new_key() -> bytes:
    """Make a private key (X25519, RFC 7748), 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_half(private_key: bytes) -> bytes:
    """The public key that belongs to a private one, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()


def is_usable(public_key: object) -> TypeGuard[bytes]:
    """Whether a secret can be agreed with the owner of this key; some points give none."""
    if not isinstance(public_key, bytes) or len(public_key) != KEY_BYTES:
        return False
    try:
        session_secret(new_key(), public_key, new_nonce(), "")
    except ValueError:
        return False
    return True


def new_nonce() -> bytes:
    """256 random bits."""
    return secrets.token_bytes(KEY_BYTES)


def session_secret(private_key: bytes, other_public: bytes, nonce: bytes, session: str) -> bytes:
    """What both ends of a session know, and nobody else.

    HKDF-SHA256 (RFC 5869) of the X25519 agreement, salted with the nonce and bound to the session's
    name; 32 bytes.

    Raises
    ------
    ValueError
        If the other's key is not a usable one.
    """
    other = X25519PublicKey.from_public_bytes(other_public)
    agreed = X25519PrivateKey.from_private_bytes(private_key).exchange(other)
    info = b"graft session\0" + session.encode()
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=nonce, info=info).derive(agreed)


def token(secret: bytes, connection: int) -> str:
    """The token of a session's connection number `connection`, from 1: 256 bits, in hex."""
    return hmac.new(secret, connection.to_bytes(8, "big"), hashlib.sha256).hexdigest()


def same(one: str, other: str) -> bool:
    """Compare tokens in a time that does not depend on where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())
