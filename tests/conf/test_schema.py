"""Each section refuses values out of range and settings that contradict each other."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from conf.load import FOLDER, load_config
from conf.rules import ConfigError, split_address
from conf.schema import (
    AggregationConfig,
    Config,
    CutConfig,
    DataConfig,
    FederationConfig,
    LinkConfig,
    LoraSettings,
    ModelConfig,
    OutputConfig,
    RuntimeConfig,
    TrainConfig,
    TuningConfig,
)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (CutConfig, {"bottom": -1}),
        (CutConfig, {"top": 1.0}),
        (TuningConfig, {"trunk": "half"}),
        (LoraSettings, {"rank": 0}),
        (LoraSettings, {"dropout": 1.0}),
        (LoraSettings, {"target_modules": [1]}),
        (ModelConfig, {"dtype": "float32"}),
        (ModelConfig, {"attention": "flash"}),
        (ModelConfig, {"scratch": "llama"}),
        (DataConfig, {"source": "web"}),
        (DataConfig, {"context": 1}),
        (DataConfig, {"heldout": 0.6}),
        (DataConfig, {"heldout": -0.1}),
        (DataConfig, {"alpha": 0}),
        (DataConfig, {"overlong": "wrap"}),
        (DataConfig, {"format": "chatml"}),
        (DataConfig, {"partitioner": "random"}),
        (DataConfig, {"max_examples": -1}),
        (TrainConfig, {"strategy": "fed avg"}),
        (TrainConfig, {"warmup": 1.0}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"accumulate": 0}),
        (TrainConfig, {"clip": -1}),
        (TrainConfig, {"betas": (0.9, 1.0)}),
        (TrainConfig, {"precision": "fp16"}),
        (TrainConfig, {"schedule": "step"}),
        (FederationConfig, {"fraction_train": 0.0}),
        (FederationConfig, {"fraction_evaluate": 1.1}),
        (FederationConfig, {"min_clients": 0}),
        (FederationConfig, {"round_timeout": 0}),
        (LinkConfig, {"bind": "localhost"}),
        (LinkConfig, {"bind": "localhost:70000"}),
        (LinkConfig, {"bind": ":9393"}),
        (LinkConfig, {"advertise": "trunk.example.org:0"}),
        (LinkConfig, {"tls": "maybe"}),
        (LinkConfig, {"codec": "int/8"}),
        (AggregationConfig, {"lora": ""}),
        (LinkConfig, {"timeout": float("inf")}),
        (RuntimeConfig, {"client_threads": -1}),
        (RuntimeConfig, {"trunk_device": "GPU 1"}),
        (OutputConfig, {"log_every": 0}),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(section: Any, values: dict[str, Any]) -> None:
    (name, value), *_ = values.items()
    with pytest.raises(ConfigError, match=rf"{section.section}\.{name} must be") as caught:
        section(**values)
    assert repr(value) in str(caught.value)
    assert caught.value.key == f"{section.section}.{name}"


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        (ModelConfig, {"path": "x", "scratch": {"model_type": "gpt2"}}, "exclude each other"),
        (
            LinkConfig,
            {"codec": "h1=int4 int6"},
            r"such a name for each crossing, got 'h1=int4 int6'$",
        ),
        (LinkConfig, {"codec": "int4 int6"}, r"such a name for each crossing, got 'int4 int6'$"),
        (LinkConfig, {"codec": "h1=int4,h1=int6"}, r"'h1=int4,h1=int6' names a crossing twice"),
        (ModelConfig, {"base": "x"}, r"set model\.path to the adapter's folder"),
        (ModelConfig, {"scratch": {"n_layer": 2}, "tokenizer": "bytes"}, "needs a model_type"),
        (ModelConfig, {"scratch": {"model_type": "gpt2"}}, r"needs model\.tokenizer"),
        (TuningConfig, dict.fromkeys(("bottom", "trunk", "top"), "frozen"), "nothing would be"),
        (DataConfig, {"prompt_column": "q"}, r"set data\.completion_column too"),
        (DataConfig, {"completion_column": "a"}, r"set data\.prompt_column too"),
        (
            DataConfig,
            {"prompt_column": "q", "completion_column": "a", "messages_column": "m"},
            "exclude each other",
        ),
        (
            DataConfig,
            {"format": "alpaca", "messages_column": "m", "source": "files"},
            "data.messages_column .'m'. is not read with data.format=alpaca",
        ),
        (
            DataConfig,
            {"format": "text", "prompt_column": "q", "completion_column": "a"},
            "set data.format to auto or prompt, or clear",
        ),
        (DataConfig, {"path": "x.txt"}, r"set data\.source=files"),
        (DataConfig, {"source": "hub"}, r"needs data\.path"),
        (DataConfig, {"source": "files", "partitioner": "natural"}, r"needs data\.partition_by"),
        (DataConfig, {"source": "files", "partitioner": "dirichlet"}, r"needs data\.partition_by"),
        (TrainConfig, {"local_epochs": 0}, "both 0"),
        (TrainConfig, {"momentum": 0.9}, r"train\.optimizer=sgd"),
        (LinkConfig, {"certificate": "c.pem"}, r"set link\.key too"),
        (LinkConfig, {"key": "k.pem"}, r"set link\.certificate too"),
        (LinkConfig, {"certificate": "c", "key": "k", "tls": "off"}, r"link\.tls=on"),
    ],
)
def test_a_contradiction_is_refused_with_the_remedy(
    section: Any, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        section(**values)


def test_legal_combinations_are_accepted() -> None:
    DataConfig(partitioner="natural")
    DataConfig(source="files", partitioner="dirichlet", partition_by="label")
    TrainConfig(local_epochs=0, local_steps=3, optimizer="sgd", momentum=0.9)
    LinkConfig(bind="[::1]:50051", advertise="trunk.example.org:443", certificate="c", key="k")
    CutConfig(bottom=0, top=0)


def test_values_are_read_as_their_declared_type() -> None:
    train = TrainConfig(lr="1e-3", betas=[0, 0.5])  # type: ignore[arg-type]
    assert train.lr == 1e-3
    assert train.betas == (0.0, 0.5)
    assert isinstance(train.betas[0], float)
    assert LoraSettings(target_modules="q, v").target_modules == ("q", "v")  # type: ignore[arg-type]


def test_a_configuration_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        CutConfig(1, 2)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="seed must be"):
        Config(seed=-1)
    with pytest.raises(ConfigError, match="cut must be a CutConfig"):
        Config(cut={"bottom": 1})  # type: ignore[arg-type]


def test_a_bare_config_exists_but_does_not_pass_the_check(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"no model: set model\.path"):
        Config().check()
    with pytest.raises(ConfigError, match=r"data\.context \(600\) is longer than .*\(512\)"):
        load_config("demo", "data.context=600")
    with pytest.raises(ConfigError, match="no model"):
        load_config("lora", "model.path=")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            "tuning.bottom=frozen tuning.trunk=frozen tuning.top=frozen",
            r"all frozen: nothing would be trained; make one of them",
        ),
        (
            "tuning.bottom=lora tuning.trunk=frozen tuning.top=frozen cut.bottom=0",
            r"nothing would be trained: tuning\.bottom=lora with cut\.bottom=0 .*\(cut\.bottom=1\)",
        ),
        (
            "tuning.bottom=frozen tuning.trunk=frozen tuning.top=lora cut.top=0",
            r"nothing would be trained: tuning\.top=lora with cut\.top=0 .*\(from override 'cut\.",
        ),
        (
            "tuning.bottom=lora tuning.trunk=frozen tuning.top=lora cut.bottom=0 cut.top=0",
            r"tuning\.bottom=lora with cut\.bottom=0 and tuning\.top=lora with cut\.top=0",
        ),
        ("model.dtype=fp16", r"\(tuning\.bottom=full, .*\).*eps.*dtype=bf16 or .*fp32.*lora"),
        (
            "model.dtype=fp16 tuning.bottom=lora tuning.trunk=frozen",
            r"model\.dtype=fp16 cannot be trained as a whole \(tuning\.top=full\)",
        ),
        (
            "link.bind=0.0.0.0:9393",
            r"clients would be told 0\.0\.0\.0:9393; set link\.advertise to the name by which "
            r"they reach it \(from override",
        ),
        ("link.bind=0.0.0.0:0", r"told 0\.0\.0\.0:PORT; .*and give link\.bind a port"),
        ("link.bind=[::]:9393", r"clients would be told \[::\]:9393; set link\.advertise"),
        ("link.bind=[0:0::0]:9393", "clients would be told"),
        ("link.bind=[::ffff:0.0.0.0]:9393", "clients would be told"),
        ("link.bind=:9393", r"link\.bind must be host:port"),
        ("link.bind=0.0.0.0:9393 link.advertise=0.0.0.0:9393", "no address to connect to"),
        ("link.bind=10.0.0.1:9393 link.advertise=x.org:0", "a port from 1 to 65535"),
        (
            "link.bind=0.0.0.0:0 link.advertise=x.org:9393",
            "any free port, which nobody can forward",
        ),
        ("link.advertise=x.org:9393", "any free port, which nobody can forward"),
    ],
)
def test_a_run_that_cannot_work_is_refused_with_the_remedy(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("demo", overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        "tuning.bottom=lora tuning.trunk=lora tuning.top=lora cut.bottom=0 cut.top=0",
        "tuning.bottom=full tuning.trunk=frozen tuning.top=frozen cut.bottom=0",
        "tuning.bottom=lora tuning.trunk=frozen tuning.top=lora cut.bottom=0",
        "model.dtype=fp16 tuning.bottom=lora tuning.trunk=lora tuning.top=frozen",
        "model.dtype=bf16",
        "link.bind=0.0.0.0:9393 link.advertise=trunk.example.org:9393",
        "link.bind=[::]:9393 link.advertise=[2001:db8::1]:443",
        "link.bind=10.0.0.1:9393",
        "link.bind=[::1]:0",
    ],
)
def test_a_run_that_can_work_is_accepted(overrides: str) -> None:
    load_config("demo", overrides)


def test_the_commands_of_the_deployment_guide_are_accepted() -> None:
    text = (FOLDER.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    found = re.findall(r"experiment='(\w+)' overrides='([^']*)'", text)
    assert found
    for experiment, overrides in found:
        load_config(experiment, overrides)


@pytest.mark.parametrize("text", ["host", ":80", "host:", "host:x", "::1:80", "h:99999", "[h]:1"])
def test_an_address_must_parse(text: str) -> None:
    with pytest.raises(ValueError, match="is not host:port|above 65535"):
        split_address(text)


def test_an_address_is_split_into_host_and_port() -> None:
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[::1]:443") == ("::1", 443)
