"""the API key: where it comes from, when there must be one, and whether a request has it"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from pathlib import Path

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
SHORTEST = 8


def find_key(given: str, file: Path | None, environment: Mapping[str, str]) -> str:
    """Return the key that requests must have: an option, a file's first line, or GRAFT_API_KEY.

    Raises
    ------
    ValueError
        If it is given twice, or is too short to keep anybody out.
    """
    if given and file:
        raise ValueError("--api-key and --api-key-file both give a key; give one")
    key = given or (_first_line(file) if file else environment.get("GRAFT_API_KEY", ""))
    if key and (len(key) < SHORTEST or not key.isascii() or key.split() != [key]):
        raise ValueError(
            f"an API key is to be {SHORTEST} or more ASCII characters without blanks; try: "
            "openssl rand -hex 24"
        )
    return key


def _first_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").split("\n")
    if not lines[0].strip():
        raise ValueError(f"{file} holds no API key in its first line")
    return lines[0].strip()


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def demand_key(host: str, key: str) -> None:
    """Refuse to let others in without a key."""
    if not key and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from other machines, so an API key is needed: set "
            "GRAFT_API_KEY, or give --api-key-file; or bind to 127.0.0.1"
        )


def has_key(header: str, key: str) -> bool:
    """Return whether an Authorization header bears the key; takes as long whatever it bears."""
    scheme, _, sent = header.partition(" ")
    same = hmac.compare_digest(_digest(sent.strip()), _digest(key))
    return same and scheme.lower() == "bearer"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
