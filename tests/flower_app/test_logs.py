"""What Graft's modules log is told from the lines of Flower and Ray, and reaches the console."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from flower_app.logs import PACKAGES, mark_lines
from simulations.launch.console import Console

ACTOR = "(ClientAppActor pid=4711) "

DOCUMENTED = [
    ("no checkpoint of round", "docs/resume.md"),
    ("an old checkpoint", "docs/resume.md"),
    ("the clients differ", "docs/resume.md"),
    ("clients of the cohort have come within %.0f s and begin", "docs/resume.md"),
    ("cannot be written: %s. The run goes on", "docs/reliability.md"),
    ("loss.png cannot be written", "docs/reliability.md"),
    ("Attempt %d of %d follows", "docs/reliability.md"),
    ("does not take part", "docs/federation.md"),
    ("clients of the cohort have come within %.0f s; the others", "docs/federation.md"),
    ("documents skipped", "docs/data.md"),
]


@pytest.fixture
def marked() -> Iterator[None]:
    """Graft's loggers as the apps set them up."""
    mark_lines()
    mark_lines()
    yield
    for name in PACKAGES:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)


def _warning(words: str, project: Path) -> tuple[str, str]:
    """The module and the text of a `logger.warning(...)` with these words."""
    for path in (path for package in PACKAGES for path in (project / package).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match call:
                case ast.Call(func=ast.Attribute(attr="warning"), args=[ast.Constant(text), *_]):
                    if words in text:
                        module = path.relative_to(project).with_suffix("").as_posix()
                        return module.replace("/", "."), text
    raise AssertionError(f"nothing warns with {words!r}")


def _console(lines: str) -> list[str]:
    shown: list[str] = []
    console = Console(shown.append)
    for line in lines.splitlines():
        console(line)
    return shown


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize(("words", "page"), DOCUMENTED)
def test_a_documented_warning_reaches_the_console(
    words: str, page: str, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module, text = _warning(words, project)
    assert (project / page).exists()

    logging.getLogger(module).warning("%s", text)

    printed = capfd.readouterr().err
    assert _console(printed) == [f"WARNING: {text}"]
    assert _console(ACTOR + printed) == [f"WARNING: {text}"]


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_warns_past_the_mark(package: str, project: Path) -> None:
    for path in (project / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert '"WARNING: ' not in text, f"{path}: let a logger say it"
        assert "log(WARNING" not in text, f"{path}: let the module's logger say it, not Flower's"


def test_warnings_of_others_stay_away() -> None:
    others = ["WARNING :   flwr has news", f"{ACTOR}WARNING :   deprecated", "INFO :      x"]
    assert _console("\n".join(others)) == []
