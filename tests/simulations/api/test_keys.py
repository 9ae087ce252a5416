"""Who needs a key, where it comes from, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.api.app import Access
from simulations.api.keys import find_key, has_key, is_loopback
from simulations.api.serve import Settings, address


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_others_are_not_let_in_without_a_key(host: str) -> None:
    with pytest.raises(ValueError, match=r"GRAFT_API_KEY.*--api-key-file.*127\.0\.0\.1"):
        Settings(host=host)
    Settings(host=host, access=Access(key="long-enough"))


def test_loopback_is_what_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "localhost.example.org", "")))


def test_a_key_is_given_once_or_comes_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("of-the-file\nand no more\n", encoding="utf-8")
    surroundings = {"GRAFT_API_KEY": "of-the-environment"}
    assert find_key("", None, {}) == ""
    assert find_key("", None, surroundings) == "of-the-environment"
    assert find_key("", file, surroundings) == "of-the-file"
    assert find_key("of-the-option", None, surroundings) == "of-the-option"
    with pytest.raises(ValueError, match="give one"):
        find_key("of-the-option", file, {})
    for bad in ("short", "with blanks in it", "schlüssel-schlüssel"):
        with pytest.raises(ValueError, match="8 or more ASCII"):
            find_key(bad, None, {})


def test_a_header_has_the_key_or_has_not() -> None:
    assert has_key("Bearer secret-key", "secret-key")
    assert has_key("bearer  secret-key ", "secret-key")
    for wrong in ("", "Bearer", "Bearer secret-ke", "Bearer secret-keyy", "Basic secret-key"):
        assert not has_key(wrong, "secret-key")


def test_an_address_is_a_host_and_a_port() -> None:
    assert address("0.0.0.0:80") == ("0.0.0.0", 80)
    assert address(":8001") == address("8001") == ("127.0.0.1", 8001)
    assert address("[::1]:0") == ("::1", 0)
    for bad in ("localhost", "a:b", "a:99999"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            address(bad)
