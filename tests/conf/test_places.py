"""A path that moved along with the folder that refers to it is found; no other path is touched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conf.load import load_config, to_yaml
from conf.places import follow
from conf.schema import Config, ModelConfig


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "old" / "runs"
    for name in ("base/model", "adapted/model"):
        (folder / name).mkdir(parents=True)
    return folder


def test_what_is_there_and_what_is_no_path_stays(runs: Path) -> None:
    for path in (str(runs / "base" / "model"), "org/name", "last:demo", "", "/nowhere/base/other"):
        assert follow(path, runs / "adapted") == path


def test_what_moved_along_is_found_by_two_names_at_least(runs: Path, tmp_path: Path) -> None:
    new = tmp_path / "elsewhere"
    shutil.move(runs, new)

    for folder in (new / "adapted", new / "adapted" / "model"):
        assert follow(str(runs / "base" / "model"), folder) == str(new / "base" / "model")
    assert follow("/base", new / "adapted") == "/base"
    assert follow("/model", new / "adapted" / "model") == "/model"


def test_a_copy_reads_the_original_while_it_is_there(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "copy")
    told = str(runs / "base" / "model")
    assert follow(told, tmp_path / "copy" / "adapted") == told


def test_a_runs_configuration_is_read_where_it_was_moved_to(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(Config(), model=ModelConfig(path=str(runs / "base" / "model")))
    (runs / "adapted" / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    shutil.move(runs, tmp_path / "new")

    found = load_config(str(tmp_path / "new" / "adapted" / "config.yaml"))

    assert found.model.path == str(tmp_path / "new" / "base" / "model")
    assert f"model.path was {runs}/base/model and is read from {found.model.path}" in caplog.text
