"""Certificates: one made for a run, whose PEM reaches clients in Flower's messages; and clocks."""

from __future__ import annotations

import datetime
import ipaddress

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def check_certificate(certificate: bytes, key: bytes, host: str) -> None:
    """Refuse an operator's certificate that no client could accept, before any has tried.

    Parameters
    ----------
    certificate, key : bytes
        PEM; the first certificate of a chain is the server's.
    host : str
        What clients connect to.

    Raises
    ------
    ValueError
        If one of them is unreadable, they do not belong together, the certificate does not hold the
        host's name, or it is not valid now.
    """
    try:
        leaf = x509.load_pem_x509_certificates(certificate)[0]
    except ValueError as error:
        raise ValueError(f"link.certificate holds no PEM certificate: {error}") from error
    try:
        public = serialization.load_pem_private_key(key, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"link.key holds no PEM private key without a pass phrase: {error}"
        ) from error
    if public != leaf.public_key():
        raise ValueError("link.key is not the key of link.certificate's first certificate")
    names = _names(leaf)
    if not any(_covers(name, host) for name in names):
        raise ValueError(
            f"link.certificate is for {', '.join(names) or 'no name'}, and clients connect to "
            f"{host}; set link.advertise to one of its names, or get a certificate for {host}"
        )
    if reason := validity_error(certificate):
        raise ValueError(reason)


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    addresses = extension.value.get_values_for_type(x509.IPAddress)
    return [*extension.value.get_values_for_type(x509.DNSName), *map(str, addresses)]


def _covers(name: str, host: str) -> bool:
    """Whether a certificate's name is the host's; ``*.`` stands for one label."""
    name, host = name.lower(), host.lower()
    if name.startswith("*."):
        return "." in host and host.partition(".")[2] == name[2:]
    return name == host


def validity_error(pem: bytes, now: datetime.datetime | None = None) -> str:
    """Why a certificate is not valid by this machine's clock; empty if it is.

    Parameters
    ----------
    pem : bytes
        One certificate or a chain, whose first is the server's.
    now : datetime, optional
        Aware; by default this machine's time.

    Raises
    ------
    ValueError
        If it is no certificate.
    """
    certificate = x509.load_pem_x509_certificates(pem)[0]
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = now or datetime.datetime.now(datetime.UTC)
    if first <= now <= last:
        return ""
    return (
        f"the trunk's certificate is valid from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} "
        f"UTC, and this machine's clock says {now:%Y-%m-%d %H:%M} UTC; set the clock (timedatectl "
        "set-ntp true), or renew link.certificate if it has expired"
    )


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


CLOCKS_APART = datetime.timedelta(days=1)
"""How far a client's clock may be behind before a new certificate looks not yet valid to it."""


def self_signed(host: str, days: int = 365) -> tuple[bytes, bytes]:
    """Make a self-signed P-256 certificate for `host`.

    Returns
    -------
    certificate, key : bytes
        PEM. The key never leaves the process that made it.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Graft trunk")])
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        alternative = x509.DNSName(host)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_APART)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
