"""Who may use a trunk that is served: the server's keys, and a file for each client."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models import Cut
from strategies.transport import tickets
from strategies.transport.certificates import check_certificate, self_signed
from strategies.transport.stream.generation import Invited

FORMAT = 1
"""Of access files and the server's own; raised when their meaning changes."""

KEYS, CERTIFICATE, CERTIFICATE_KEY = "server.json", "certificate.pem", "certificate-key.pem"
"""What the server keeps beside the access files."""

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that is served, as its clients are told."""

    name: str
    description: str
    fingerprint: str
    cut: Cut
    hidden_size: int


@dataclass(frozen=True, kw_only=True)
class Access:
    """All that a client needs, besides its ends of the model."""

    address: str
    certificate: str
    """PEM to trust; empty: no TLS (loopback)."""
    client: str
    key: bytes
    """The client's private key: whoever has it may use the trunk."""
    trunk_key: bytes
    nonce: bytes
    models: tuple[ServedModel, ...]
    expires: float | None = None
    """Seconds of the epoch; None: never."""

    def write(self, path: Path) -> None:
        """Write a file that only its owner can read."""
        told = asdict(self) | {
            "graft_access": FORMAT,
            "key": self.key.hex(),
            "trunk_key": self.trunk_key.hex(),
            "nonce": self.nonce.hex(),
            "expires": None if self.expires is None else _day(self.expires),
        }
        write_private(path, json.dumps(told, indent=2) + "\n")

    def model(self, name: str) -> ServedModel:
        """The model of a name; none: the first."""
        found = {each.name: each for each in self.models}
        if name and name not in found:
            raise ValueError(f"no model '{name}' is served there; there is {', '.join(found)}")
        return found[name] if name else self.models[0]


def read_access(path: str | Path) -> Access:
    """Read an access file.

    Raises
    ------
    ValueError
        If it is none, or has expired.
    """
    path = Path(path).expanduser()
    told = _read(path, "graft_access", "an access file, as `graft serve` writes them")
    try:
        access = _access(told)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is no whole access file ({type(error).__name__}: {error}): copy it again, as "
            "`graft serve` wrote it"
        ) from error
    if access.expires is not None and time.time() > access.expires:
        raise ValueError(
            f"the access file {path} expired on {_day(access.expires)} UTC: ask whoever runs the "
            "server for a new one"
        )
    return access


def _access(told: Mapping[str, Any]) -> Access:
    keys = {name: bytes.fromhex(told[name]) for name in ("key", "trunk_key", "nonce")}
    if any(len(key) != tickets.KEY_BYTES for key in keys.values()):
        raise ValueError("a key is not of 32 bytes")
    if not tickets.is_usable(keys["trunk_key"]) or not told["models"]:
        raise ValueError("the server's key is none, or no model is named")
    models = tuple(ServedModel(**{**each, "cut": Cut(**each["cut"])}) for each in told["models"])
    for name in ("address", "certificate", "client"):
        if not isinstance(told[name], str):
            raise TypeError(f"{name} is no text")
    return Access(
        address=told["address"],
        certificate=told["certificate"],
        client=told["client"],
        models=models,
        expires=_instant(told["expires"]) if told.get("expires") else None,
        **keys,
    )


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What a server keeps, so that one that is started again accepts the same access files."""

    private: bytes
    clients: dict[str, Invited]

    def write(self, path: Path) -> None:
        """Write a file that only its owner can read."""
        clients = {
            name: {
                "public_key": each.public_key.hex(),
                "nonce": each.nonce.hex(),
                "expires": each.expires,
            }
            for name, each in self.clients.items()
        }
        told = {"graft_server": FORMAT, "private": self.private.hex(), "clients": clients}
        write_private(path, json.dumps(told, indent=2) + "\n")


def read_keys(folder: Path) -> Keys:
    """The keys in a server's folder; new ones, if there are none."""
    path = folder / KEYS
    if not path.exists():
        return Keys(private=tickets.new_key(), clients={})
    told = _read(path, "graft_server", "what a server keeps")
    try:
        clients = {
            name: Invited(
                public_key=bytes.fromhex(each["public_key"]),
                nonce=bytes.fromhex(each["nonce"]),
                expires=each["expires"],
            )
            for name, each in told["clients"].items()
        }
        return Keys(private=bytes.fromhex(told["private"]), clients=clients)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it, start the server again and hand out its new "
            "access files"
        ) from error


def admit(
    folder: Path, keys: Keys, clients: int, days: float = 0.0
) -> tuple[Keys, dict[str, bytes]]:
    """Let so many clients in: those there are, and new ones.

    One whose access has expired has a new key, and needs the new file.

    Returns
    -------
    keys : Keys
        With these clients alone.
    private : dict
        Private keys of those whose file is to be written; the others have theirs.
    """
    expires = time.time() + days * DAY if days else None
    admitted: dict[str, Invited] = {}
    private: dict[str, bytes] = {}
    for name in (f"client-{number}" for number in range(1, clients + 1)):
        known = keys.clients.get(name)
        if known is not None and (known.expires is None or known.expires > time.time()):
            admitted[name] = known
            if (key := _written(folder / f"{name}.json", known)) is not None:
                private[name] = key
            continue
        private[name] = key = tickets.new_key()
        admitted[name] = Invited(
            public_key=tickets.public_half(key), nonce=tickets.new_nonce(), expires=expires
        )
    return replace(keys, clients=admitted), private


def _written(path: Path, known: Invited) -> bytes | None:
    """The private key in a client's file, if it lies here and is the client's."""
    try:
        key = bytes.fromhex(json.loads(path.read_text(encoding="utf-8"))["key"])
        return key if tickets.public_half(key) == known.public_key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it was handed out, and only its holder can read it now


def write_files(
    folder: Path,
    keys: Keys,
    private: Mapping[str, bytes],
    *,
    address: str,
    certificate: bytes,
    models: Sequence[ServedModel],
) -> list[Path]:
    """Write the server's keys, and the access files of these clients; returns the latter."""
    keys.write(folder / KEYS)
    paths = []
    for name, key in private.items():
        invited = keys.clients[name]
        access = Access(
            address=address,
            certificate=certificate.decode(),
            client=name,
            key=key,
            trunk_key=tickets.public_half(keys.private),
            nonce=invited.nonce,
            models=tuple(models),
            expires=invited.expires,
        )
        access.write(folder / f"{name}.json")
        paths.append(folder / f"{name}.json")
    return paths


def own_certificate(folder: Path, host: str) -> tuple[Path, Path]:
    """A certificate of this server's own for `host`: the one in its folder, while it is good."""
    certificate, key = folder / CERTIFICATE, folder / CERTIFICATE_KEY
    try:
        check_certificate(certificate.read_bytes(), key.read_bytes(), host)
    except (OSError, ValueError):
        pem, secret = self_signed(host)
        write_private(certificate, pem.decode())
        write_private(key, secret.decode())
    return certificate, key


def write_private(path: Path, text: str) -> None:
    """Write a file at once, which only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)


def _read(path: Path, mark: str, what: str) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not {what}: {error}") from error
    if not isinstance(told, dict) or mark not in told:
        raise ValueError(f"{path} is not {what}")
    if told[mark] != FORMAT:
        raise ValueError(
            f"{path} is of format {str(told[mark])[:20]}, {FORMAT} is read here: run the same "
            "release of Graft on both sides"
        )
    return told


def _day(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _instant(day: str) -> float:
    return datetime.strptime(day, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
