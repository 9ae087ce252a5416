"""What may not be set together, in one section or across sections, refused with the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conf.rules import ConfigError

if TYPE_CHECKING:
    from conf.schema import Config, DataConfig, LinkConfig, ModelConfig, TrainConfig, TuningConfig


def check_model(model: ModelConfig) -> None:
    if model.path and model.scratch:
        raise ConfigError(
            f"model.path ({model.path!r}) and model.scratch exclude each other: "
            "clear one of them (model.scratch={} or model.path=)",
            key="model.path",
        )
    if model.scratch and not isinstance(model.scratch.get("model_type"), str):
        raise ConfigError(
            "model.scratch needs a model_type, such as llama or gpt2; it has "
            f"{', '.join(model.scratch)}",
            key="model.scratch",
        )
    if model.scratch and not model.tokenizer:
        raise ConfigError(
            "model.scratch needs model.tokenizer: `bytes`, or the folder or hub id of one",
            key="model.tokenizer",
        )


def check_tuning(tuning: TuningConfig) -> None:
    if tuning.bottom == tuning.trunk == tuning.top == "frozen":
        raise ConfigError(
            "tuning.bottom, tuning.trunk and tuning.top are all frozen: nothing would be "
            "trained; make one of them lora or full",
            key="tuning.trunk",
        )


def check_data(data: DataConfig) -> None:
    if bool(data.prompt_column) != bool(data.completion_column):
        missing = "completion_column" if data.prompt_column else "prompt_column"
        raise ConfigError(
            "data.prompt_column and data.completion_column go together: set "
            f"data.{missing} too, or clear the other",
            key=f"data.{missing}",
        )
    if data.prompt_column and data.messages_column:
        raise ConfigError(
            f"data.prompt_column ({data.prompt_column!r}) and data.messages_column "
            f"({data.messages_column!r}) exclude each other: clear one of them",
            key="data.messages_column",
        )
    if data.source == "builtin" and data.path:
        raise ConfigError(
            f"data.path ({data.path!r}) is not read with data.source=builtin: set "
            "data.source=files or data.source=hub",
            key="data.path",
        )
    if data.source == "hub" and not data.path:
        raise ConfigError("data.source=hub needs data.path, a data set id", key="data.path")
    by_value = data.partitioner in ("natural", "dirichlet")
    if by_value and not data.partition_by and data.source != "builtin":
        raise ConfigError(
            f"data.partitioner={data.partitioner} needs data.partition_by, the column whose "
            "values it goes by; or set data.partitioner=iid",
            key="data.partition_by",
        )


def check_train(train: TrainConfig) -> None:
    if train.local_steps == 0 and train.local_epochs == 0:
        raise ConfigError(
            "train.local_steps and train.local_epochs are both 0: set one of them",
            key="train.local_epochs",
        )
    if train.momentum and train.optimizer != "sgd":
        raise ConfigError(
            f"train.momentum ({train.momentum}) is for train.optimizer=sgd; adamw has train.betas",
            key="train.momentum",
        )


def check_link(link: LinkConfig) -> None:
    if bool(link.certificate) != bool(link.key):
        missing = "key" if link.certificate else "certificate"
        raise ConfigError(
            f"link.certificate and link.key go together: set link.{missing} too, or clear both "
            "to have a certificate made for the run",
            key=f"link.{missing}",
        )
    if link.certificate and link.tls == "off":
        raise ConfigError(
            f"link.certificate ({link.certificate!r}) is not used with link.tls=off: set "
            "link.tls=on, or clear the certificate and key",
            key="link.tls",
        )


def check_config(config: Config) -> None:
    if not config.model.path and not config.model.scratch:
        raise ConfigError(
            "no model: set model.path to a folder, hub id or last:NAME, or describe one in "
            "model.scratch",
            key="model.path",
        )
    for name in ("max_position_embeddings", "n_positions"):
        limit = config.model.scratch.get(name)
        if isinstance(limit, int) and limit < config.data.context:
            raise ConfigError(
                f"data.context ({config.data.context}) is longer than model.scratch.{name} "
                f"({limit}): lower one or raise the other",
                key="data.context",
            )
