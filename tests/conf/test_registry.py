"""What a folder of modules offers is found by name, and not imported before it is wanted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from conf import registry
from conf.rules import ConfigError, check_known


def test_a_new_file_is_offered_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "toy_things"
    package.mkdir()
    for name in ("__init__", "registry", "_helper", "first", "a_second_one"):
        (package / f"{name}.py").write_text(f"NAME = {name!r}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    assert registry.names("toy_things") == ["a-second-one", "first"]
    assert "toy_things.first" not in sys.modules
    assert registry.load("toy_things", "a-second-one").NAME == "a_second_one"


def test_a_name_is_read_from_the_source_without_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "toy_kinds"
    package.mkdir()
    for name in ("__init__", "mine"):
        (package / f"{name}.py").write_text('class Mine:\n    name = "my-own"\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    assert registry.declares("toy_kinds", "my-own")
    assert not registry.declares("toy_kinds", "mine")
    assert not registry.declares("nowhere_at_all", "mine")
    assert "toy_kinds.mine" not in sys.modules


def test_an_unknown_name_is_refused_with_all_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^a\.b must be one of one, two, got 'tow'.*'two'\?$"):
        check_known("a.b", "tow", ["one", "two"])
    check_known("a.b", "two", ["one", "two"])
