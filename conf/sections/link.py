"""`link`: The data plane."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from conf import rules
from conf.rules import ConfigError, nearest, one_of, setting, split_address
from conf.sections.base import Section

CROSSINGS = ("h1", "h2", "grad_h2", "grad_h1")
"""The four ways that tensors cross a cut: activations up and down, their gradients up and down."""


@dataclass(frozen=True, kw_only=True)
class LinkConfig(Section):
    """The data plane: how activations and gradients travel between a client and the trunk."""

    section: ClassVar[str] = "link"

    transport: str = setting("stream", one_of("stream", "messages"))
    """stream (gRPC, a port of its own) or messages (nothing but Flower's own, two for a step)."""
    bind: str = setting("127.0.0.1:0", rules.ADDRESS)
    """Address the trunk listens on; port 0: any free one (simulation)."""
    advertise: str = setting("", rules.ADDRESS_OR_EMPTY)
    """Address clients connect to, if it is not `bind` (a public name, a forwarded port)."""
    tls: str = setting("auto", one_of("auto", "on", "off"))
    """auto (off on loopback, else a certificate made for the run), on, or off."""
    certificate: str = ""
    """PEM file of the operator's certificate chain (with `key`), not one made for the run."""
    key: str = ""
    codec: dict[str, Any] = field(
        default_factory=lambda: dict.fromkeys(CROSSINGS, "fp32"),
        metadata={"rule": rules.NAME_FOR_EACH},
    )
    """How activations and gradients are written on the wire: fp32, fp16, bf16, int8 to int2, klt,
    or what strategies/transport/codec holds besides. One name for all, or one for each of h1, h2,
    grad_h2 and grad_h1, as a mapping or in words (h1=int4 h2=int6)."""
    window: int = setting(4, rules.WINDOW)
    """Micro-batches of a step that may be under way at once over the stream; 1: one at a time, and
    no step begins before the answer to the last one."""
    timeout: float = setting(120.0, rules.POSITIVE)
    """Seconds that a client waits for a reply, and the trunk for a client's next frame."""
    max_frame_mb: float = setting(64.0, rules.POSITIVE)
    """Largest frame that is accepted, MiB; the trunk accepts none larger than a batch needs."""
    max_in_flight_mb: float = setting(4096.0, rules.POSITIVE)
    """Most activations whose step is not taken yet, over all sessions, MiB."""
    cache_mb: float = setting(0.0, rules.NOT_NEGATIVE)
    """MiB that the trunk, for each client, and each client may keep of the activations of examples,
    so that an example which comes again crosses the cuts for less; 0: nothing is kept. For a frozen
    bottom."""
    grace: float = setting(30.0, rules.POSITIVE)
    """Seconds that a client may be out of reach: so long the trunk keeps a session whose stream
    broke and the client tries to come back, and so long a newcomer's first answer is waited for."""

    def __post_init__(self) -> None:
        if isinstance(self.codec, str):
            object.__setattr__(self, "codec", read_codecs(self.codec))
        super().__post_init__()

    def _check_together(self) -> None:
        self._check_crossings()
        if bool(self.certificate) != bool(self.key):
            missing = "key" if self.certificate else "certificate"
            raise ConfigError(
                f"link.certificate and link.key go together: set link.{missing} too, or clear both "
                "to have a certificate made for the run",
                key=f"link.{missing}",
            )
        if self.certificate and self.tls == "off":
            raise ConfigError(
                f"link.certificate ({self.certificate!r}) is not used with link.tls=off: set "
                "link.tls=on, or clear the certificate and key",
                key="link.tls",
            )

        if self.cache_mb and self.transport == "messages":
            raise ConfigError(
                f"link.cache_mb={self.cache_mb:g} is for a stream: over link.transport=messages "
                "nothing is kept between steps; set link.cache_mb=0, or link.transport=stream",
                key="link.cache_mb",
            )
        if self.transport == "stream" and self.grace > self.timeout / 2:
            raise ConfigError(
                f"link.grace={self.grace:g} is more than half of link.timeout={self.timeout:g}: "
                "those who wait for a client that is out of reach would give up before it is given "
                "up; lower link.grace, or raise link.timeout",
                key="link.grace",
            )
        if self.transport == "stream":
            _check_reachable(self)

    @property
    def codec_words(self) -> str:
        """The codecs as an override has them."""
        return codec_words(self.codec)

    def _check_crossings(self) -> None:
        """Every crossing has a codec; those that are not named are fp32."""
        for name in self.codec:
            if name not in CROSSINGS:
                raise ConfigError(
                    f"link.codec has no {name!r}{nearest(name, CROSSINGS)}; it has "
                    f"{', '.join(CROSSINGS)}",
                    key="link.codec",
                )
        whole = {name: self.codec.get(name, "fp32") for name in CROSSINGS}
        object.__setattr__(self, "codec", whole)


def codec_words(names: Mapping[str, str]) -> str:
    """Return what `read_codecs` reads: one name, if those of all crossings are alike."""
    unlike = list(dict.fromkeys(names.values()))
    return unlike[0] if len(unlike) == 1 else " ".join(f"{way}={n}" for way, n in names.items())


def in_words(value: Any) -> Any:
    """Return any setting's value, as words if it names a codec for each crossing."""
    is_codec = isinstance(value, Mapping) and set(value) == set(CROSSINGS)
    return codec_words(value) if is_codec else value


def read_codecs(words: str) -> dict[str, Any]:
    """Return what `link.codec` is to be, from words such as `int4` or `h1=int4 h2=int6`.

    Raises
    ------
    ConfigError
        If a crossing comes twice, or what is no name.
    """
    each = [item.partition("=") for item in words.replace(",", " ").split() if "=" in words]
    found = {way: name for way, _, name in each} or dict.fromkeys(CROSSINGS, words)
    if not rules.NAME_FOR_EACH.holds(found):
        raise ConfigError(
            f"link.codec must be {rules.NAME_FOR_EACH.words}, got {words!r}", key="link.codec"
        )
    if len(found) < len(each):
        raise ConfigError(
            f"link.codec={words!r} names a crossing twice: keep one of them", key="link.codec"
        )
    return found


def _check_reachable(link: LinkConfig) -> None:
    """Refuse addresses by which clients could not reach the trunk."""
    host, port = split_address(link.bind)
    if link.advertise and _is_wildcard(split_address(link.advertise)[0]):
        raise ConfigError(
            f"link.advertise ({link.advertise!r}) is no address to connect to: set it to the name "
            "by which clients reach the trunk",
            key="link.advertise",
        )
    if link.advertise and port == 0:
        raise ConfigError(
            f"link.bind ({link.bind!r}) takes any free port, which nobody can forward "
            f"link.advertise ({link.advertise!r}) to: give link.bind a port, or clear "
            "link.advertise",
            key="link.bind",
        )
    if _is_wildcard(host) and not link.advertise:
        raise ConfigError(
            f"link.bind ({link.bind!r}) listens on every interface, and clients would be told "
            f"{link.bind.rpartition(':')[0]}:{port or 'PORT'}; set link.advertise to the name "
            "by which they reach it" + ("" if port else ", and give link.bind a port"),
            key="link.bind",
        )


def _is_wildcard(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("*", "0")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address.is_unspecified or (mapped is not None and mapped.is_unspecified)
