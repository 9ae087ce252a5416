"""Where the page is to be had, and when it demands a password."""

from __future__ import annotations

import pytest

from simulations.ui.bind import Bind, listen, password_for, read_bind


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:80", "127.0.0.1", 80, True),
        ("127.9.0.1", "127.9.0.1", 7860, True),
        (":0", "127.0.0.1", 0, True),
        ("localhost:7", "localhost", 7, True),
        ("[::1]:7", "::1", 7, True),
        ("[::1]", "::1", 7860, True),
        ("0.0.0.0:7", "0.0.0.0", 7, False),
        ("[::]:7", "::", 7, False),
        ("10.0.0.1:7", "10.0.0.1", 7, False),
        ("127.0.0.1.example.com:7", "127.0.0.1.example.com", 7, False),
    ],
)
def test_an_address_is_read_and_known_for_loopback(
    text: str, host: str, port: int, loopback: bool
) -> None:
    bind = read_bind(text)

    assert (bind.host, bind.port, bind.loopback) == (host, port, loopback)


@pytest.mark.parametrize("text", ["127.0.0.1:http", "127.0.0.1:99999", "::1:7:x"])
def test_a_port_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="127.0.0.1:7860"):
        read_bind(text)


def test_beyond_loopback_a_password_is_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_UI_PASSWORD", raising=False)
    everywhere = Bind(host="0.0.0.0")

    with pytest.raises(ValueError, match="needs a password: set GRAFT_UI_PASSWORD"):
        password_for(everywhere, None, None)
    with pytest.raises(ValueError, match="needs a password"):
        password_for(everywhere, "", lambda: "")
    with pytest.raises(ValueError, match="8 or more"):
        password_for(everywhere, "short", None)
    assert password_for(everywhere, None, lambda: "asked for it") == "asked for it"
    monkeypatch.setenv("GRAFT_UI_PASSWORD", "of the environment")
    assert password_for(everywhere, None, None) == "of the environment"
    assert password_for(everywhere, "of the command", None) == "of the command"


def test_on_loopback_a_password_is_a_matter_of_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_UI_PASSWORD", raising=False)

    assert password_for(Bind(), None, lambda: "never asked") is None
    assert password_for(Bind(), "pw", None) == "pw"


def test_a_taken_port_is_told_in_words() -> None:
    with listen(Bind(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}.*--bind"):
            listen(Bind(port=port))
