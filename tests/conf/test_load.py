"""The configuration is merged from YAML and overrides; what is wrong is refused with its source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.load import (
    FOLDER,
    experiments,
    from_before,
    from_json,
    load_config,
    override,
    read_value,
    to_dict,
    to_json,
    to_yaml,
)
from conf.renamed import RENAMED
from conf.rules import ConfigError
from conf.schema import Config, ModelConfig
from conf.sections.link import codec_words, in_words


def test_base_yaml_lists_every_key_with_its_default() -> None:
    base = OmegaConf.to_container(OmegaConf.load(FOLDER / "base.yaml"))
    assert base == to_dict(Config())


def test_every_experiment_loads_and_opens_with_the_command_that_launches_it() -> None:
    assert {"demo", "lora", "smollm2", "deployment"} <= set(experiments())
    for name in experiments():
        assert load_config(name).experiment == name
        text = (FOLDER / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
        comment = text.split("\n\n")[0]
        assert all(line.startswith("#") for line in comment.splitlines())
        assert "flwr run ." in comment
        assert f"experiment='{name}'" in comment


def test_later_layers_win() -> None:
    config = load_config("demo", "train.lr=1e-3 cut.bottom=2")
    assert config.train.lr == 1e-3  # the override
    assert config.cut.bottom == 2
    assert config.train.local_steps == 40  # the experiment
    assert config.train.clip == 1.0  # base.yaml


def test_overrides_are_split_like_a_shell_does() -> None:
    config = load_config(
        "demo", "data.partitioner=iid data.source=files data.path='/my data/é' data.name=2020"
    )
    assert config.data.path == "/my data/é"
    assert config.data.name == "2020"
    listed = load_config("deployment", ["data.path=/my data/é"])
    assert listed.data.path == "/my data/é"


def test_an_override_replaces_the_whole_value() -> None:
    config = load_config("demo", "model.scratch={} model.path=gpt2 model.tokenizer=")
    assert config.model == ModelConfig(path="gpt2")
    config = load_config("demo", "lora.target_modules=[q_proj,v_proj]")
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert load_config("demo", "lora.target_modules=c_attn").lora.target_modules == ("c_attn",)


def test_keys_inside_the_model_description_are_free() -> None:
    scratch = load_config("demo", "model.scratch.hidden_size=64 model.scratch.new=[1,2]").model
    assert scratch.scratch["hidden_size"] == 64
    assert scratch.scratch["new"] == [1, 2]
    assert scratch.scratch["num_hidden_layers"] == 6


def test_yaml_1_1_traps_are_read_as_meant(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model: {path: gpt2}\ntrain: {lr: 1e-3, eps: '1e-7'}\n", encoding="utf-8")
    config = load_config(str(own), "link.tls=off")
    assert config.train.lr == 1e-3
    assert config.train.eps == 1e-7
    assert config.link.tls == "off"
    assert config.experiment == "own"
    own.write_text("model: {path: gpt2}\nlink: {tls: off}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"link\.tls must be one of.*got False.*quotes"):
        load_config(str(own))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", r"unknown key 'train.lrr' in override 'train.lrr=1'.*'train.lr'\?"),
        ("lr=1", r"unknown key 'lr'.*did you mean 'train.lr'\?"),
        (
            "train={lr: 1}",
            r"unknown key 'train'.*is a section; name one of its keys, such as 'train",
        ),
        ("trian.lr=1", r"did you mean 'train.lr'\?"),
        ("cut.middle=1", r"unknown key 'cut.middle'.*cut has bottom, top"),
        ("zzz.qqq=1", "the sections are model, cut"),
        ("train.lr=fast", r"train\.lr must be a positive number, got 'fast' \(from override"),
        ("train.lr=-1", r"train\.lr must be a positive number, got -1"),
        ("train.lr=.nan", r"train\.lr must be a positive number"),
        ("train.rounds=2.5", r"train\.rounds must be a whole number, 1 or more, got 2.5"),
        ("train.rounds=true", r"train\.rounds must be a whole number, 1 or more, got True"),
        ("output.save_model=1", r"output\.save_model must be true or false, got 1"),
        ("train.optimizer=adam", r"one of adamw, sgd, got 'adam'; did you mean 'adamw'\?"),
        ("train.lr=", r"train\.lr must be a positive number, got nothing"),
        ("train.betas=[0.9]", r"train\.betas must be two numbers"),
        ("train", r"override 'train' is not key=value"),
        ("model.scratch=[1", "not YAML"),
        ("experiment=lora", "name it as the experiment"),
        ("data.path='x", "cannot be split"),
    ],
)
def test_a_wrong_override_is_refused_in_words(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("demo", override)


def test_a_wrong_key_or_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model: {path: gpt2}\ntrain: {rouns: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'train.rouns' in .*own\.yaml.*'train.rounds'\?"):
        load_config(str(own))
    own.write_text("model: {path: gpt2}\ntrain: {rounds: many}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rounds must be .*'many' \(from .*own\.yaml\)"):
        load_config(str(own))
    own.write_text("train: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="train is a section"):
        load_config(str(own))
    own.write_text("train: {rounds: [\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"own\.yaml cannot be read"):
        load_config(str(own))


@pytest.mark.parametrize(
    "line", ["link: {codec: [int4]}", "model: {scratch: [1]}", "lora: {target_modules: {a: 1}}",
             "train: {betas: {a: 1}}", "train: {rounds: [1]}", "train: {rounds: {a: 1}}"]
)  # fmt: skip
def test_a_list_for_a_mapping_and_the_other_way_is_refused_in_words(
    line: str, tmp_path: Path
) -> None:
    """OmegaConf itself says no more than `Cannot merge incompatible container types`."""
    own = tmp_path / "own.yaml"
    own.write_text(line, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"must be .*, got .*\(from .*own\.yaml\)"):
        load_config(str(own))


@pytest.mark.parametrize("words", ["int4", "h1=int4 h2=int6 grad_h2=int2 grad_h1=int2"])
def test_codecs_in_words_are_read_wherever_a_value_is_and_come_back_as_words(words: str) -> None:
    config = load_config("demo", [f"link.codec={words}"])
    assert read_value("link.codec", words) == config.link.codec
    assert codec_words(config.link.codec) == config.link.codec_words == words
    assert in_words(to_dict(config)["link"]["codec"]) == words
    assert [in_words(each) for each in ({"h1": "int4"}, 3, "a", None)] == [
        {"h1": "int4"},
        3,
        "a",
        None,
    ]


def old_file(folder: Path, lines: str) -> str:
    own = folder / "own.yaml"
    own.write_text(f"model: {{path: gpt2}}\n{lines}\n", encoding="utf-8")
    return str(own)


def test_a_file_with_a_name_of_before_is_read_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(old_file(tmp_path, "link: {dtype: bf16, timeout: 99}"), "link.window=1")

    assert set(config.link.codec.values()) == {"bf16"}
    assert (config.link.timeout, config.link.window) == (99, 1)
    assert "own.yaml: link.dtype is link.codec now, and is read as that" in caplog.text


def test_a_value_under_a_name_of_before_is_refused_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"link\.codec must be .*got .*\(from .*own\.yaml\)"):
        load_config(old_file(tmp_path, "link: {dtype: 'b/f16'}"))
    with pytest.raises(ConfigError, match=r"own\.yaml has link\.dtype beside link\.codec.*keep"):
        load_config(old_file(tmp_path, "link: {dtype: bf16, codec: fp32}"))


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_name_of_before_is_refused_with_the_one_of_now(old: str, new: str) -> None:
    """In what is typed or sent; the nearest of the other names would mislead."""
    with pytest.raises(ConfigError, match=f"unknown key '{old}' in override.*: it is {new} now"):
        load_config("demo", f"{old}=fp32")
    with pytest.raises(ConfigError, match=f"it is {new} now"):
        override(load_config("demo"), f"{old}=fp32")
    tree = to_dict(load_config("demo"))
    section, name = old.split(".")
    tree[section][name] = "fp32"
    with pytest.raises(ConfigError, match=f"'{old}' in the JSON.*: it is {new} now"):
        from_json(json.dumps(tree))


def test_what_a_version_before_wrote_down_is_built() -> None:
    config = load_config("demo", "link.codec=bf16 train.lr=0.5")
    tree = to_dict(config)
    tree["link"]["dtype"] = "bf16"
    for section, name in (("link", "codec"), ("link", "window"), ("train", "patience")):
        del tree[section][name]
    del tree["tracking"]

    built, notes = from_before(tree)

    assert built == config
    assert notes[0] == "link.dtype is link.codec now, and is read as that"
    assert "link.window, tracking.project, tracking.sinks, train.patience was not" in notes[1]
    assert from_before(to_dict(config)) == (config, [])
    with pytest.raises(ConfigError, match="unknown key 'extra'"):
        from_before(to_dict(config) | {"extra": {}})


def test_an_unknown_experiment_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dmo'; did you mean 'demo'\?.*deployment, lora"):
        load_config("dmo")
    with pytest.raises(ConfigError, match="no experiment file .*none.yaml"):
        load_config(str(tmp_path / "none.yaml"))


def test_a_run_is_reproduced_by_its_resolved_configuration(tmp_path: Path) -> None:
    config = load_config("lora", "train.lr=1e-5 seed=7 lora.target_modules=[q_proj] data.name='é'")
    assert from_json(to_json(config)) == config
    for name, text in (("config.yaml", to_yaml(config)), ("config.json", to_json(config))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_config(str(tmp_path / name)) == config


def test_from_json_is_strict() -> None:
    config = load_config("demo")
    with pytest.raises(ConfigError, match="not JSON"):
        from_json("{")
    with pytest.raises(ConfigError, match="mapping of sections"):
        from_json("[]")
    tree = to_dict(config)
    del tree["train"]["clip"]
    with pytest.raises(ConfigError, match=r"lacks train\.clip"):
        from_json(json.dumps(tree))
    tree = to_dict(config) | {"extra": {}}
    with pytest.raises(ConfigError, match="unknown key 'extra'"):
        from_json(json.dumps(tree))
    tree = to_dict(config)
    tree["train"]["lr"] = None
    with pytest.raises(ConfigError, match=r"train\.lr must be"):
        from_json(json.dumps(tree))


def test_every_key_is_documented() -> None:
    text = (FOLDER.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        if not dataclasses.is_dataclass(value):
            assert f"`{section.name}`" in text
            continue
        for item in dataclasses.fields(value):
            assert f"`{section.name}.{item.name}`" in text
