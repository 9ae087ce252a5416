"""Who answers at the trunk's address, and when: certificates, names, clocks (row 26)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from simulations.deploy.credentials import make_server_credentials
from strategies.errors import TrunkError
from strategies.transport.certificates import (
    CLOCKS_APART,
    _covers,
    self_signed,
    validity_error,
)
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService
from tests.strategies.helpers import (
    NODE_KEY,
    H,
    admit,
    forward,
    link_config,
    open_engine,
    served,
)

QUICK = {"timeout": 3.0, "grace": 1.5}


@contextmanager
def trunk(**link: object) -> Iterator[TrunkService]:
    with served(open_engine(), **{"tls": "on", **QUICK, **link}) as service:
        yield service


def write(folder: Path, certificate: bytes, key: bytes) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    (folder / "cert.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    return {"certificate": str(folder / "cert.pem"), "key": str(folder / "key.pem")}


@pytest.mark.parametrize("chain", ["leaf", "leaf and authority"])
def test_the_operators_certificate_is_trusted_as_it_stands(chain: str, tmp_path: Path) -> None:
    """Whatever authority signed it: clients get it from Flower, and ask nobody else."""
    files = make_server_credentials(tmp_path)
    pem = files.certificate.read_bytes() + (files.ca.read_bytes() if "and" in chain else b"")
    with trunk(**write(tmp_path / "own", pem, files.key.read_bytes())) as service:
        assert service.certificate == pem
        link = GrpcLink(admit(service, "a"), NODE_KEY, steps=1, config=link_config(**QUICK))
        assert forward(link, 0, 0, H, None).shape == H.shape
        link.abort()


def test_another_certificate_is_refused(tmp_path: Path) -> None:
    """Somebody else answers at the trunk's address, with a certificate of the same name."""
    with trunk() as service:
        ticket = replace(admit(service, "a"), certificate=self_signed("127.0.0.1")[0])
        with pytest.raises(TrunkError, match="shows another certificate than the one") as refused:
            GrpcLink(ticket, NODE_KEY, steps=1, config=link_config(**QUICK))
    assert refused.value.kind == "certificate"


def test_a_certificate_without_the_advertised_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, where it can be mended; and if it got past that, by the client."""
    own = write(tmp_path, *self_signed("trunk.example.org"))
    with pytest.raises(ValueError, match="is for trunk.example.org, and .* 127"), trunk(**own):
        pass
    monkeypatch.setattr("strategies.transport.stream.bind.check_certificate", lambda *args: None)
    with trunk(**own) as service, pytest.raises(TrunkError, match="is for another name") as refused:
        GrpcLink(admit(service, "a"), NODE_KEY, steps=1, config=link_config(**QUICK))
    assert refused.value.kind == "certificate"


def test_names_of_certificates() -> None:
    for name, host, covered in (
        ("trunk.example.org", "Trunk.example.org", True),
        ("*.example.org", "trunk.example.org", True),
        ("*.example.org", "a.trunk.example.org", False),
        ("*.example.org", "example.org", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.11", False),
    ):
        assert _covers(name, host) is covered, (name, host)


def test_a_key_of_another_certificate_is_said(tmp_path: Path) -> None:
    own = write(tmp_path, self_signed("127.0.0.1")[0], self_signed("127.0.0.1")[1])
    with pytest.raises(ValueError, match="link.key is not the key of"), trunk(**own):
        pass
    own["key"] = str(tmp_path / "nowhere.pem")
    with (
        pytest.raises(ValueError, match=r"cannot be read: .*nowhere.pem.*absolute paths"),
        trunk(**own),
    ):
        pass


def test_a_name_nobody_knows_is_said_with_the_remedy() -> None:
    with trunk() as service:
        ticket = replace(admit(service, "a"), address="trunk.invalid:9393")
    with pytest.raises(TrunkError, match=r"no trunk answers at trunk.invalid:9393; check that"):
        GrpcLink(ticket, NODE_KEY, steps=1, config=link_config(**QUICK))


@pytest.mark.parametrize(("days", "word"), [(-2, "this machine's clock says"), (400, "expired")])
def test_clocks_far_apart_are_told_from_other_troubles(
    days: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    wrong = now + datetime.timedelta(days=days)
    certificate, _ = self_signed("127.0.0.1")
    assert word in validity_error(certificate, wrong)
    assert "timedatectl" in validity_error(certificate, wrong)
    assert validity_error(certificate) == ""
    assert validity_error(certificate, now - CLOCKS_APART + datetime.timedelta(minutes=5)) == ""

    monkeypatch.setattr(
        "strategies.transport.stream.connection.validity_error",
        lambda pem: validity_error(pem, wrong),
    )
    with trunk() as service, pytest.raises(TrunkError, match="valid from") as refused:
        GrpcLink(admit(service, "a"), NODE_KEY, steps=1, config=link_config(**QUICK))
    assert refused.value.kind == "clock"


def test_the_key_of_a_certificate_made_for_the_run_is_its_own() -> None:
    certificate, key = self_signed("127.0.0.1")
    public = serialization.load_pem_private_key(key, None).public_key()
    assert x509.load_pem_x509_certificate(certificate).public_key() == public
    assert self_signed("127.0.0.1")[1] != key


@pytest.mark.parametrize("broken", ["certificate", "key"])
def test_a_certificate_that_cannot_be_used_is_said_at_the_start(
    broken: str, tmp_path: Path
) -> None:
    files = write(tmp_path, *self_signed("127.0.0.1"))
    Path(str(files[broken])).write_text("nonsense")
    with pytest.raises(ValueError, match=r"link\.(certificate|key)"), trunk(**files):
        pass
