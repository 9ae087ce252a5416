"""What `graft ui` refuses before it loads anything, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models import Cut
from simulations.ui.begin import Door, What, begin, check_installed, newest, opened


def test_a_missing_package_is_told_with_the_command_that_installs_it() -> None:
    with pytest.raises(ValueError, match=r"needs gradio, not installed: pip install 'graft\[ui\]'"):
        check_installed(lambda name: None if name == "gradio" else name)
    check_installed(lambda name: name)


def test_an_access_file_without_ends_is_refused(tmp_path: Path) -> None:
    what = What(access=tmp_path / "client-1.json")

    with pytest.raises(ValueError, match="nothing to talk with"), opened(what):
        pass


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"ends": "parts"}, "--ends belongs to a trunk that is served"),
        ({"source": "a", "ends": "b", "access": Path("c")}, "give one of RUN_OR_MODEL and --ends"),
        ({"source": "a", "access": Path("c"), "cut": Cut(1, 1)}, "leave out --cut"),
    ],
)
def test_what_would_be_passed_over_is_refused(what: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words), opened(What(**what)):
        pass


def test_other_machines_are_not_let_in_without_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    monkeypatch.delenv("GRAFT_UI_PASSWORD", raising=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    door = Door(bind="0.0.0.0:0", user="graft", password=None)

    with pytest.raises(ValueError, match="needs a password"):
        begin(What(source="never looked at"), door, print)


def test_without_runs_there_is_nothing_to_talk_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))

    assert newest() == ""
    with opened(What()) as talked:
        assert talked is None
