"""The secret that the sites of a federation share, and the operator's server does not have."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from strategies.aggregate.masked import CHECK_BYTES

KEY_BYTES = 32
NODE_SETTING = "site-key"
"""In a node's configuration: the file."""


class SiteKey:
    """Makes masks.

    Parameters
    ----------
    secret : bytes
        32 random ones.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self.check = self._derive(b"graft site key: check", CHECK_BYTES)
        """Alike where the key is; a hash of 256 random bits tells nothing of them."""

    def mask(self, nonce: bytes, name: str, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The mask of a tensor: (count,) uniform int64.

        AES-256 in counter mode, under a key of its own for each nonce and name (HKDF-SHA256), so
        that no two tensors are ever hidden by one stream.
        """
        key = self._derive(b"graft site key: mask " + nonce + name.encode(), KEY_BYTES)
        stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
        return np.frombuffer(stream.update(bytes(8 * count)), dtype="<i8")

    def of_perturbation(self, where: str) -> bytes:
        """What the perturbation of the embedding or the head is made of."""
        return self._derive(b"graft site key: perturbation " + where.encode(), KEY_BYTES)

    def _derive(self, info: bytes, length: int) -> bytes:
        return HKDF(algorithm=SHA256(), length=length, salt=None, info=info).derive(self._secret)


def new_site_key(path: Path) -> None:
    """Write a new key to a file that only its owner reads, and its folder, if there is none;
    `FileExistsError` if the file is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600), "w", encoding="ascii") as file:
        file.write(f"{secrets.token_hex(KEY_BYTES)}\n")


def read_site_key(path: Path) -> SiteKey:
    """Read a key.

    Raises
    ------
    ValueError
        If there is none, others may read it, or it is no key.
    """
    try:
        mode, text = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"the site key {path} cannot be read: {error.strerror}. `graft site-key new FILE` "
            "makes one; all sites of a federation need the same"
        ) from error
    if mode & 0o077:
        raise ValueError(f"others on this machine may read the site key {path}: chmod 600 {path}")
    if not re.fullmatch(rb"[0-9a-f]{%d}" % (2 * KEY_BYTES), text):
        raise ValueError(
            f"{path} is no site key: it must hold {2 * KEY_BYTES} hexadecimal digits, as `graft "
            "site-key new FILE` writes them"
        )
    return SiteKey(bytes.fromhex(text.decode("ascii")))


def key_of_node(node: Mapping[str, Any]) -> SiteKey:
    """The key that a node's configuration names; by default `$GRAFT_HOME/site.key`, which
    serves simulations.

    Raises
    ------
    ValueError
        If there is none, or its path is relative: Flower decides the ClientApp's working folder.
    """
    home = Path(os.environ.get("GRAFT_HOME") or "~/.graft")
    path = Path(str(node.get(NODE_SETTING, "")) or home / "site.key").expanduser()
    if not path.is_absolute():
        raise ValueError(
            f"{NODE_SETTING}={str(path)!r} in this node's config is a relative path, and Flower "
            "does not run a client in the folder you start it from: give an absolute one"
        )
    return read_site_key(path)


def refuse_plain(node: Mapping[str, Any]) -> None:
    """Refuse a run in which the server would read the ends, at a site that has a key.

    Raises
    ------
    ValueError
        If the node's configuration names a key: the server decides how a run is, not what a site
        may give away.
    """
    if node.get(NODE_SETTING):
        raise ValueError(
            f"{NODE_SETTING} in this node's config says that its ends are not for the server, and "
            "this run has privacy.ends=plain: start it with privacy.ends=masked, or take "
            f"{NODE_SETTING} out"
        )
