"""Which points a sweep has, by its command line or its file, and what is refused of any of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conf.load import experiments
from conf.rules import ConfigError
from flower_app.check import check_names
from flower_app.data.partition import take_partition
from flower_app.data.rows import Rows
from flower_app.data.sources import load_rows
from simulations.sweep.plan import check_clients, plan
from simulations.sweep.points import expand
from simulations.sweep.results import check_measures
from simulations.sweep.spec import read_spec, shipped

BASE = "experiment: demo\n"


def _file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(BASE + text)
    return str(path)


def test_a_grid_has_every_combination_and_all_of_a_seed_come_first() -> None:
    spec = read_spec("demo", ["train.lr=1e-3,3e-3", "cut.bottom=1,2", "seed=range(3)"])
    found = expand(spec, 2)
    assert found.keys == ["train.lr", "cut.bottom"]
    assert [point.seed for point in found.points] == [0] * 4 + [1] * 4 + [2] * 4
    assert [tuple(point.values.values()) for point in found.points[:4]] == [
        (0.001, 1), (0.001, 2), (0.003, 1), (0.003, 2),
    ]  # fmt: skip
    assert [config.train.lr for config in found.configs[:4]] == [0.001, 0.001, 0.003, 0.003]
    assert found.points[0].overrides == ["train.lr=1e-3", "cut.bottom=1", "seed=0"]
    assert len({point.id for point in found.points}) == 12


def test_one_value_is_fixed_and_lists_stay_whole() -> None:
    spec = read_spec("demo", ["train.rounds=7", "train.betas=[0.9,0.99],[0.8,0.9]"], "2,4")
    found = expand(spec, 2)
    assert {config.train.rounds for config in found.configs} == {7}
    assert [config.train.betas for config in found.configs[::2]] == [(0.9, 0.99), (0.8, 0.9)]
    assert [point.clients for point in found.points] == [2, 4, 2, 4]
    assert found.keys == ["train.betas", "clients"]


def test_codecs_are_swept_and_told_in_words(tmp_path: Path) -> None:
    found = expand(read_spec("demo", ["link.codec=fp32,int4"]), 2)
    assert [point.name for point in found.points] == [
        "link.codec=fp32 seed=0", "link.codec=int4 seed=0",
    ]  # fmt: skip
    text = "grid: {link.codec: [fp32, int4, klt]}\nexclude: [{link.codec: klt}]\n"
    excluding = expand(read_spec(_file(tmp_path, text), []), 2)
    assert [config.link.codec_words for config in excluding.configs] == ["fp32", "int4"]


def test_clients_are_swept_like_a_key_or_fixed() -> None:
    assert [p.clients for p in expand(read_spec("demo", ["clients=3,5"]), 2).points] == [3, 5]
    (point,) = expand(read_spec("demo", [], "4"), 2).points
    assert (point.clients, point.overrides) == (4, [])


def test_what_says_the_same_is_run_once() -> None:
    found = expand(read_spec("demo", ["train.lr=1e-3,0.001,2e-3", "clients=2,2"]), 2)
    assert len(found.points) == 2
    assert found.doubles == 4


def test_a_file_zips_excludes_includes_and_has_conditions(tmp_path: Path) -> None:
    what = _file(tmp_path, """
fixed: {train.rounds: 1}
grid:
  train.strategy: [splitfed-v1, merged]
zip:
  - {train.lr: [1e-3, 2e-3], train.batch_size: [4, 8]}
seeds: range(2)
when:
  - if: {train.strategy: merged}
    then: {train.sync: [round, step]}
include:
  - {cut.bottom: 2, train.strategy: splitfed-v2}
  - {cut.bottom: 3, seed: 9}
exclude:
  - {train.lr: 0.002, train.sync: step}
""")  # fmt: skip
    found = expand(read_spec(what), 2)
    first = [p.values for p in found.points if p.seed == 0]
    rows = [(v["train.strategy"], v["train.lr"], v["train.batch_size"], v["train.sync"],
             v["cut.bottom"]) for v in first]  # fmt: skip
    assert rows == [
        ("splitfed-v1", 0.001, 4, "round", 1),
        ("splitfed-v1", 0.002, 8, "round", 1),
        ("merged", 0.001, 4, "round", 1),
        ("merged", 0.001, 4, "step", 1),
        ("merged", 0.002, 8, "round", 1),
        ("splitfed-v2", 0.004, 8, "round", 2),
    ]
    assert found.excluded == 2
    assert [p.values["cut.bottom"] for p in found.points if p.seed == 9] == [3]
    assert len(found.points) == 13


def test_a_condition_with_one_value_follows_and_is_no_axis() -> None:
    found = expand(read_spec("heterogeneity", ["seed=0", "data.alpha=0.1,1"]), 2)
    assert found.keys == ["data.alpha", "train.strategy", "clients"]
    turns = {config.train.strategy: config.train.turns for config in found.configs}
    assert turns == {"splitfed-v1": "arrival", "splitfed-v2": "ordered", "merged": "arrival"}


def test_a_files_words_are_texts_as_they_stand(tmp_path: Path) -> None:
    what = _file(tmp_path, "grid: {link.tls: [off, on], train.lr: '1e-3,2e-3'}\nseeds: [0]\n")
    found = expand(read_spec(what), 2)
    assert [(p.values["link.tls"], p.values["train.lr"]) for p in found.points] == [
        ("off", 0.001), ("off", 0.002), ("on", 0.001), ("on", 0.002),
    ]  # fmt: skip


def test_changes_replace_what_a_file_says_of_a_key(tmp_path: Path) -> None:
    spec = read_spec("cut", ["cut.bottom=1", "link.codec=fp32", "train.rounds=1,2"])
    found = expand(spec, 2)
    assert found.keys == ["cut.top", "train.rounds"]
    assert len(found.points) == 4


def test_what_goes_with_other_keys_is_not_changed_from_outside(tmp_path: Path) -> None:
    what = _file(tmp_path, "zip: [{train.lr: [1e-3, 2e-3], train.batch_size: [4, 8]}]\n")
    with pytest.raises(ConfigError, match="train.lr is in `zip` of the sweep's file"):
        read_spec(what, ["train.lr=1e-2"])
    with pytest.raises(ConfigError, match="train.turns is in `when` of the sweep's file"):
        read_spec("heterogeneity", ["train.turns=arrival"])


def test_a_name_of_both_is_the_sweep_alone_and_the_experiment_with_changes() -> None:
    assert "lora" in experiments()
    assert read_spec("lora").grid
    assert read_spec("lora", ["train.lr=1e-3,2e-3"]).fixed == {}
    assert read_spec("conf/sweep/lora.yaml", ["train.lr=1e-3"]).grid["lora.rank"]


def test_an_experiments_file_is_one_and_its_path_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {scratch: {model_type: llama}, tokenizer: bytes}\n")
    monkeypatch.chdir(tmp_path)
    spec = read_spec("mine.yaml", ["train.lr=1e-3,2e-3"])
    assert spec.experiment == str(tmp_path / "mine.yaml")
    assert len(expand(spec, 2).points) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.lrr=1,2"], "did you mean 'train.lr'"),
        (["train.lr=1e-3,fast"], "positive number, got 'fast'.*at the point train.lr=fast"),
        (["clients=0,2"], "clients must be a whole number, 1 or more, got 0"),
        (["clients=two"], "clients must be a whole number, 1 or more, got 'two'"),
        (["train.lr"], "is not KEY=VALUE"),
        (["train.sync=round,step"], "train.sync"),
        (["experiment=lora,demo"], "not overridden"),
    ],
)
def test_a_wrong_key_or_value_of_any_point_is_refused(changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand(read_spec("demo", changes), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gird: {}\nfixed: {}\n", "unknown key 'gird'.*did you mean 'grid'"),
        ("grid: {train.lr: []}\n", "empty list"),
        ("zip: [{train.lr: [1, 2], seed: [1]}]\n", "one length; train.lr has 2, seed has 1"),
        ("when: [{if: {seed: 1}}]\n", "`if` and `then`"),
        ("exclude: [{train.lr: 1e-3}]\ngrid: {train.lr: [1e-3]}\n", "no point"),
        ("grid: {train.lr: [1e-3]}\nexclude: [{train.lrr: 1}]\n", "did you mean 'train.lr'"),
        ("search: many\n", "whole number of points"),
        ("name: ../mine\n", "name is a folder's"),
        ("zip: [{}]\n", "has keys with lists"),
        ("zip: [{train.lr: 'interval(1,2)'}]\n", "has keys with lists"),
        ("grid: {train.lr: [1]}\ngrid: {train.lr: [2]}\n", "the key 'grid' is there twice"),
        ("grid: {train: {lr: [1, 2]}}\n", "is a section; name one of its keys"),
        ("fixed: {train.lr: 1}\ngrid: {train.lr: [1, 2]}\n", "train.lr is there twice"),
        ("grid: {seed: [1, 2]}\nseeds: [3]\n", "seed is there twice"),
        ("zip: [{train.lr: [1, 2]}]\ngrid: {train.lr: [1, 2]}\n", "train.lr is there twice"),
    ],
)
def test_what_is_wrong_in_a_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand(read_spec(_file(tmp_path, text)), 2)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cut'"):
        read_spec("cutt")


def test_every_point_is_checked_as_a_run_is() -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match=r"split leaves no trunk.*at the point cut.bottom=5"):
        plan(read_spec("demo", ["cut.bottom=1,5"]), "", said.append)
    with pytest.raises(ValueError, match=r"splitfed-v1.*at the point train.strategy=splitfed-v4"):
        plan(read_spec("demo", ["train.strategy=merged,splitfed-v4"]), "", said.append)
    with pytest.raises(ConfigError, match="interval.*add --search"):
        plan(read_spec("demo", ["train.lr=interval(1e-4,1e-2)"]), "", said.append)
    with pytest.raises(ValueError, match="run `make demo` first"):
        plan(read_spec("lora"), "", said.append)


def test_the_number_of_clients_is_the_superlinks() -> None:
    for spec in (read_spec("demo", [], "2,4"), read_spec("demo", ["clients=3"])):
        with pytest.raises(ConfigError, match="is the SuperLink's"):
            check_clients(spec, "office")
        check_clients(spec, "")
    sweep, _ = plan(read_spec("deployment", ["seed=0,1"]), "office", print)
    assert [point.clients for point in sweep.points] == [0, 0]


@pytest.mark.parametrize("name", shipped())
def test_what_ships_is_right_at_every_point(name: str) -> None:
    spec = read_spec(name)
    found = expand(spec, 2)
    check_measures(spec.plot)
    assert found.doubles == 0
    divided = {}
    for point, config in zip(found.points, found.configs, strict=True):
        check_names(config)
        divided[repr((config.data, point.clients, config.seed))] = (config, point.clients)
    loaded: dict[str, Rows] = {}
    for config, clients in divided.values():
        source = repr(replace(config.data, alpha=1.0))  # which only divides
        if source not in loaded:
            loaded[source] = load_rows(config.data)
        rows = loaded[source]  # all of them are divided, whoever's part is asked for
        take_partition(rows, config.data, partition=0, partitions=clients, seed=config.seed)


def test_what_ships_opens_with_its_command(project: Path) -> None:
    for name in shipped():
        text = (project / "conf" / "sweep" / f"{name}.yaml").read_text()
        head = text.split("\n\n")[0]
        command = next(line for line in head.splitlines() if line.startswith("#   graft sweep "))
        assert read_spec(command.split()[3]).name == name
