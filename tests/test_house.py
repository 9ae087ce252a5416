"""The house as docs/architecture.md draws it: nothing imports upwards or in a circle.

Imports count wherever they stand: in a function and under TYPE_CHECKING, too.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOMS = (
    "conf",
    "models",
    "strategies",
    "strategies/engine",
    "strategies/generation",
    "strategies/aggregate",
    "strategies/transport",
    "strategies/rounds",
    "flower_app/data",
    "flower_app/runs",
    "flower_app/metrics",
    "flower_app",
    "flower_app/client",
    "flower_app/serving",
    "flower_app/exports",
    "simulations/launch",
    "simulations/sweep",
    "simulations/report",
    "simulations/deploy",
    "simulations/equality",
    "simulations/network",
    "simulations/disturb",
    "simulations/plan",
    "simulations/talk",
    "simulations/chat",
    "simulations/api",
    "simulations/ui",
    "simulations/evaluate",
    "simulations/bench",
    "simulations/audit",
    "simulations/study",
    "simulations/watch",
    "simulations/cli",
)
"""Each may import itself and those before it. A folder not named here is part of the one above."""
ENTRANCE = "flower_app"
"""Its own files are the apps and what they are made of: they may import all rooms behind them."""
PACKAGES = ("conf", "models", "strategies", "flower_app", "simulations")
GENERATED = re.compile(r"_pb2(_grpc)?\.py$")
MOST_LINES, MOST_OF_A_FUNCTION, MEDIAN_OF_FUNCTIONS = 350, 60, 10


@cache
def _sources(project: Path) -> dict[str, Path]:
    """Files by module name."""
    paths = (path for package in PACKAGES for path in (project / package).rglob("*.py"))
    own = [path.relative_to(project) for path in paths if not GENERATED.search(path.name)]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in own}


@cache
def _imports(project: Path) -> dict[str, set[str]]:
    """For each of our modules those of ours that it imports."""
    sources = _sources(project)
    found = {}
    for module, path in sources.items():
        tree = ast.parse((project / path).read_text(encoding="utf-8"))
        named = {name for node in ast.walk(tree) for name in _named(node, sources)}
        found[module] = (named & set(sources)) - {module}
    return found


def _named(node: ast.AST, sources: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name if name in sources else node.module for name in inside)


def _room(path: Path) -> str:
    folders = [str(parent) for parent in path.parents]
    return next(folder for folder in folders if folder in ROOMS or folder == ".")


def _circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of which each is imported by the one before it, and the first by the last."""
    open_, done = [], set[str]()

    def visit(module: str) -> list[str]:
        if module in open_:
            return [*open_[open_.index(module) :], module]
        if module in done:
            return []
        open_.append(module)
        for other in sorted(imports[module]):
            if found := visit(other):
                return found
        done.add(open_.pop())
        return []

    return next((found for module in sorted(imports) if (found := visit(module))), [])


def test_every_file_is_in_a_room(project: Path) -> None:
    nowhere = [str(path) for path in _sources(project).values() if _room(path) == "."]
    packages = {f"{package}/__init__.py" for package in PACKAGES}
    assert set(nowhere) <= packages


def test_nothing_imports_upwards(project: Path) -> None:
    sources, wrong = _sources(project), []
    for module, imported in _imports(project).items():
        own = _room(sources[module])
        for other in sorted(imported):
            room = _room(sources[other])
            behind = own == ENTRANCE and room.startswith(f"{ENTRANCE}/")
            if room != "." and not behind and ROOMS.index(room) > ROOMS.index(own):
                wrong.append(f"{sources[module]} ({own}) imports {other} ({room})")
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_in_a_circle(project: Path) -> None:
    circle = _circle(_imports(project))
    assert not circle, " -> ".join(circle)


def test_a_circle_is_found() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_files_are_short(project: Path) -> None:
    lines = {
        str(path): len((project / path).read_text(encoding="utf-8").splitlines())
        for path in _sources(project).values()
    }
    long = {path: count for path, count in lines.items() if count > MOST_LINES}
    assert not long


def test_functions_are_short(project: Path) -> None:
    lengths = {}
    for path in _sources(project).values():
        for node in ast.walk(ast.parse((project / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                lengths[f"{path}:{node.lineno} {node.name}"] = count
    long = {name: count for name, count in lengths.items() if count > MOST_OF_A_FUNCTION}
    assert not long
    assert statistics.median(lengths.values()) <= MEDIAN_OF_FUNCTIONS
