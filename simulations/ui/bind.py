"""Where the page is to be had, and who may open it."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

PASSWORD = "GRAFT_UI_PASSWORD"
LEAST = 8
"""Characters of a password that guards more than this machine."""


@dataclass(frozen=True, kw_only=True)
class Bind:
    """An address to listen on."""

    host: str = "127.0.0.1"
    port: int = 7860

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def shown(self) -> str:
        """The host as a browser takes it; a wildcard cannot be opened."""
        if self.host in ("0.0.0.0", "::"):
            return socket.gethostname()
        return f"[{self.host}]" if ":" in self.host else self.host


def read_bind(text: str) -> Bind:
    """Read `HOST:PORT`, `HOST` or `:PORT`; an IPv6 address stands in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, ""
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if port and not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ValueError(f"--bind {text}: the port {port!r} is none; give it as in 127.0.0.1:7860")
    return Bind(host=host, port=int(port) if port else 7860)


def listen(bind: Bind) -> socket.socket:
    """Take the address, before anything is loaded; port 0 takes any that is free."""
    family = socket.AF_INET6 if ":" in bind.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((bind.host, bind.port))
        taken.listen(128)
    except OSError as error:
        taken.close()
        raise ValueError(
            f"the page cannot listen on {bind.host}:{bind.port}: {error.strerror or error}; "
            "choose another address or port with --bind (port 0: any that is free)"
        ) from error
    return taken


def password_for(bind: Bind, given: str | None, ask: Callable[[], str] | None) -> str | None:
    """Return the password that the page asks for; None if it asks for none.

    Parameters
    ----------
    given : str, optional
        Of the command line.
    ask : callable, optional
        Asks at the terminal, if there is one.

    Raises
    ------
    ValueError
        If others can reach the page and there is no password, or a short one.
    """
    password = given if given is not None else os.environ.get(PASSWORD)
    if bind.loopback:
        return password or None
    if not password and ask is not None:
        password = ask()
    if not password:
        raise ValueError(
            f"--bind {bind.host} lets other machines open the page, so it needs a password: set "
            f"{PASSWORD} or give --password; or stay on 127.0.0.1 and reach it through "
            f"`ssh -L {bind.port}:127.0.0.1:{bind.port} THIS_MACHINE`"
        )
    if len(password) < LEAST:
        raise ValueError(
            f"the password has {len(password)} characters, and --bind {bind.host} lets other "
            f"machines try it: use {LEAST} or more"
        )
    return password


def same(a: str, b: str) -> bool:
    """Compare without telling by the time taken where they differ."""
    return hmac.compare_digest(a.encode(), b.encode())
