"""What the project promises about itself: its layers, its bundle, its README."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from strategies.transport.frames import WIRE_VERSION

PACKAGES = ("conf", "models", "strategies", "flower_app", "simulations")
WITHOUT_FLOWER = ("conf", "models")
HEAVY = {"torch", "transformers", "peft", "datasets", "flwr", "flwr_datasets", "matplotlib", "ray"}
SHIPPED = ("flower_app", "strategies", "models", "conf")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")


def _tracked(project: Path) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return sorted(path for path in listed.stdout.splitlines() if (project / path).exists())


def _sources(project: Path, package: str) -> list[Path]:
    return [path for path in (project / package).rglob("*.py") if not GENERATED.search(path.name)]


def _imports(tree: ast.AST) -> set[str]:
    """Return the top-level packages that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.fixture(scope="session")
def settings(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("package", WITHOUT_FLOWER)
def test_configuration_and_models_do_not_know_flower(project: Path, package: str) -> None:
    for path in _sources(project, package):
        imported = _imports(ast.parse(path.read_text(encoding="utf-8")))
        assert not imported & {"flwr", "flwr_datasets"}, path.relative_to(project)


def test_command_line_imports_nothing_heavy(project: Path) -> None:
    for path in _sources(project, "simulations/cli"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        assert not _imports(top) & (HEAVY | set(PACKAGES) - {"simulations"}), path
        ours = re.findall(r"(?m)^(?:from|import) (simulations[.\w]*)", path.read_text("utf-8"))
        assert all(name.startswith("simulations.cli") for name in ours), path


def test_no_bare_except_and_no_pickle(project: Path) -> None:
    for package in PACKAGES:
        for path in _sources(project, package):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                bare = isinstance(node, ast.ExceptHandler) and node.type is None
                assert not bare, f"{path.relative_to(project)}:{getattr(node, 'lineno', 0)}"
                # torch.load unpickles, if less with weights_only; files here are safetensors.
                loads = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
                assert not loads, f"{path.relative_to(project)}:{getattr(node, 'lineno', 0)}"
            assert not _imports(tree) & {"pickle", "dill", "cloudpickle", "shelve"}, path
            assert "unittest" not in _imports(tree), f"{path}: inject, and mock in tests alone"


def test_bundle_holds_the_app_and_nothing_else(project: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(project))) as bundle:
        names = set(bundle.namelist())
    expected = {
        path
        for path in _tracked(project)
        if path.split("/")[0] in SHIPPED and path.endswith((".py", ".yaml"))
    }
    extra = {"pyproject.toml", "LICENSE", "README.md", ".info/CONTENT"}
    assert names - expected == extra
    assert expected <= names, f"left out of the bundle: {sorted(expected - names)}"
    for needed in ("flower_app/server_app.py", "conf/base.yaml", "conf/experiment/demo.yaml"):
        assert needed in names


def test_flowers_hub_would_take_the_app(project: Path, settings: dict[str, Any]) -> None:
    from flwr.cli.app_cmd.publish import _validate_files
    from flwr.cli.utils import filter_paths_for_publish
    from flwr.supercore.fab_format_version import normalize_and_validate_fab_format

    metadata = normalize_and_validate_fab_format(settings)
    published = filter_paths_for_publish({path: project / path for path in _tracked(project)})

    assert metadata.fab_format_version == 1
    tested = re.search(r"(?m)^flwr==(.+)$", (project / "constraints.txt").read_text())
    assert tested, "constraints.txt names no flwr"
    assert metadata.flwr_version_target == tested.group(1)
    assert {"README.md", "LICENSE", "pyproject.toml"} <= set(published)
    _validate_files(list(published.values()))  # raises; at most 1,000 files of 1 MB, 10 MB in all
    pictures = re.findall(r"!\[(.*?)\]", (project / "README.md").read_text(encoding="utf-8"))
    assert all(len(words) > 20 for words in pictures), "the hub shows words in place of pictures"


def test_a_run_installs_nothing(settings: dict[str, Any]) -> None:
    """Every requirement is excluded from the `uv sync` that Flower does before each run."""
    extras = settings["project"]["optional-dependencies"].values()
    wanted = [*settings["project"]["dependencies"], *(one for extra in extras for one in extra)]
    names = {re.split(r"[\s\[<>=!~;]", requirement)[0] for requirement in wanted}
    assert names == set(settings["tool"]["uv"]["exclude-dependencies"])


def test_every_requirement_has_a_tested_version(project: Path, settings: dict[str, Any]) -> None:
    files = ("constraints.txt", "constraints-trackers.txt")
    pinned = re.findall(r"(?m)^([\w.-]+)==", "".join((project / f).read_text() for f in files))
    tested = {name.lower().replace("_", "-") for name in pinned}
    assert set(settings["tool"]["uv"]["exclude-dependencies"]) <= tested


@pytest.mark.skipif(
    (sys.platform, sys.version_info[:2]) != ("linux", (3, 11)) or "+cpu" not in version("torch"),
    reason="constraints.txt was frozen on Linux with Python 3.11 and torch for CPUs",
)
def test_tested_versions_are_the_whole_set(project: Path, settings: dict[str, Any]) -> None:
    """`make setup` installs constraints.txt as it is, without asking who needs what."""
    pinned = re.findall(r"(?m)^([\w.-]+)==", (project / "constraints.txt").read_text())
    extras = settings["project"]["optional-dependencies"]
    # Not as installed: an old checkout's graft.egg-info would answer in place of pyproject.toml.
    own = [*settings["project"]["dependencies"], *extras["dev"], *extras["gguf"]]
    needed, left = {("graft", "")}, [("graft", "")]
    while left:
        name, extra = left.pop()
        for text in own if name == "graft" else requires(name) or []:
            one = Requirement(text)
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                found = {(one.name, each) for each in ("", *one.extras)} - needed
                needed |= found
                left += found
    names = {canonicalize_name(name) for name, _ in needed} - {"graft"}
    assert names == {canonicalize_name(name) for name in pinned}


def test_readme_names_every_folder(project: Path) -> None:
    """And no folder that is gone."""
    named = _paths_of_tree(_tree(project / "README.md"), folders=True)
    there = {f"{parent}/" for path in _source_files(project) for parent in Path(path).parents}
    there -= {"./"}
    assert sorted(there - named) == [], "not in README's tree"
    assert sorted(named - there) == [], "in README's tree but gone"


def test_architecture_names_every_file(project: Path) -> None:
    """And no file that is gone."""
    named = _paths_of_tree(_tree(project / "docs" / "architecture.md"))
    there = _source_files(project)
    assert sorted(there - named) == [], "not in docs/architecture.md"
    assert sorted(named - there) == [], "in docs/architecture.md but gone"


def test_documents_give_no_version_of_the_wire_but_the_one_that_is_spoken(project: Path) -> None:
    """Text wrapped or not: "The wire's version is still 3" outlived version 3."""
    pages = [project / "README.md", *(project / "docs").glob("*.md")]
    given = {
        (page.name, int(number))
        for page in pages
        for number in re.findall(
            r"wire(?:'s)?\s+version\s+(?:is\s+)?(?:still\s+)?(\d+)", page.read_text(), re.I
        )
    }
    assert not {(page, number) for page, number in given if number != WIRE_VERSION}


def test_documents_name_files_and_tests_that_exist(project: Path) -> None:
    tracked = _tracked(project)
    folders = {f"{parent}/" for path in tracked for parent in Path(path).parents}
    tests: dict[str, str] = {}  # files of one name in several folders count as one
    for path in tracked:
        if (name := Path(path).name).startswith("test_"):
            tests[name] = tests.get(name, "") + (project / path).read_text(encoding="utf-8")
    for page in (path for path in tracked if path.endswith(".md")):
        text = (project / page).read_text(encoding="utf-8")
        for path in re.findall(rf"`((?:{'|'.join(PACKAGES)}|tests)/[\w/.]*)`", text):
            assert "NAME" in path or {path, f"{path}/"} & {*tracked, *folders}, f"{page}: {path}"
        for file, name in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", text):
            assert f"def {name}" in tests.get(file, ""), f"{page}: {file}::{name}"


def _source_files(project: Path) -> set[str]:
    return {
        path
        for path in _tracked(project)
        if path.split("/")[0] in PACKAGES
        and not GENERATED.search(path)
        and not path.endswith("__init__.py")
        and path.endswith((".py", ".yaml", ".proto"))
    }


def _tree(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    match = re.search(r"<!-- tree -->\n```\n(.*?)```\n<!-- /tree -->", text, re.S)
    assert match, f"{page.name} has no tree between its markers"
    return match.group(1)


def _paths_of_tree(tree: str, *, folders: bool = False) -> set[str]:
    """Return the files, or the folders, of an indented tree of lines `name  what it is`."""
    above: list[tuple[int, str]] = []
    paths: set[str] = set()
    for line in filter(str.strip, tree.splitlines()):
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        while above and above[-1][0] >= indent:
            above.pop()
        path = "".join(folder for _, folder in above) + name
        if name.endswith("/"):
            above.append((indent, name))
        if name.endswith("/") == folders:
            paths.add(path)
    return {path for path in paths if path.split("/")[0] in PACKAGES}


def test_nothing_large_is_committed(project: Path) -> None:
    large = {path: (project / path).stat().st_size for path in _tracked(project)}
    assert {path: size for path, size in large.items() if size > 2**20} == {}


def test_no_path_of_this_machine_is_committed(project: Path) -> None:
    ours = [f"{folder}/" for folder in (project, Path.home()) if len(folder.parts) > 1]
    for path in _tracked(project):
        if path.endswith((".py", ".yaml", ".toml", ".md", ".proto", "Makefile", "run")):
            text = (project / path).read_text(encoding="utf-8")
            assert not [folder for folder in ours if folder in text], path
