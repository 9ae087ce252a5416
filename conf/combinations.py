"""What may not be set together, in one section or across sections, refused with the remedy."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from conf.rules import ConfigError, split_address

if TYPE_CHECKING:
    from conf.schema import (
        AggregationConfig,
        Config,
        DataConfig,
        LinkConfig,
        ModelConfig,
        TrainConfig,
        TuningConfig,
    )


def check_model(model: ModelConfig) -> None:
    if model.path and model.scratch:
        raise ConfigError(
            f"model.path ({model.path!r}) and model.scratch exclude each other: "
            "clear one of them (model.scratch={} or model.path=)",
            key="model.path",
        )
    if model.base and not model.path:
        raise ConfigError(
            f"model.base ({model.base!r}) is the base of the adapter at model.path, and that is not "
            "set: set model.path to the adapter's folder, or to the model itself without model.base",
            key="model.base",
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

    for name, wanted in (("sync", "round"), ("global_batch", 0)):
        if train.strategy != "merged" and (value := getattr(train, name)) != wanted:
            raise ConfigError(
                f"train.{name}={value} needs train.strategy=merged, not {train.strategy}: set "
                f"that, or train.{name}={wanted}",
                key=f"train.{name}",
            )
    if train.turns != "arrival" and train.strategy != "splitfed-v2":
        raise ConfigError(
            f"train.turns={train.turns} needs train.strategy=splitfed-v2, not {train.strategy}, "
            "where nobody takes turns: set that, or train.turns=arrival",
            key="train.turns",
        )
    if train.prox and train.sync == "step":
        raise ConfigError(
            f"train.prox ({train.prox:g}) has nothing to hold with train.sync=step, where no "
            "client's weights drift: set train.prox=0 or train.sync=round",
            key="train.prox",
        )


def check_aggregation(aggregation: AggregationConfig) -> None:
    if aggregation.lora in ("exact", "svd") and aggregation.optimizer != "fedavg":
        raise ConfigError(
            f"aggregation.lora={aggregation.lora} with aggregation.optimizer="
            f"{aggregation.optimizer}: a server optimizer moves the factors, and their product is "
            "then no mean; set aggregation.optimizer=fedavg, or aggregation.lora=factors or ffa",
            key="aggregation.optimizer",
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

    if link.transport == "stream" and link.grace > link.timeout / 2:
        raise ConfigError(
            f"link.grace={link.grace:g} is more than half of link.timeout={link.timeout:g}: those "
            "who wait for a client that is out of reach would give up before it is given up; lower "
            "link.grace, or raise link.timeout",
            key="link.grace",
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
    _check_trained(config)
    _check_aggregated(config)
    if config.link.transport == "stream":
        _check_reachable(config.link)


def _check_trained(config: Config) -> None:
    modes = {role: getattr(config.tuning, role) for role in ("bottom", "trunk", "top")}
    # LoRA adapts the linear layers of blocks; the trunk always has some.
    empty = [
        role
        for role, blocks in (("bottom", config.cut.bottom), ("top", config.cut.top))
        if modes[role] == "lora" and blocks == 0
    ]
    if empty and all(mode == "frozen" for role, mode in modes.items() if role not in empty):
        raise ConfigError(
            "nothing would be trained: "
            + " and ".join(f"tuning.{role}=lora with cut.{role}=0" for role in empty)
            + " has no blocks to adapt, and the rest is frozen; give it blocks "
            + f"(cut.{empty[0]}=1), or make another part lora or full",
            key=f"cut.{empty[0]}",
        )
    full = [role for role, mode in modes.items() if mode == "full"]
    if config.model.dtype == "fp16" and full:
        raise ConfigError(
            f"model.dtype=fp16 cannot be trained as a whole ({_assigned('tuning', full, 'full')}): "
            "small updates, and adamw's eps, are zero in fp16; set model.dtype=bf16 or "
            "model.dtype=fp32, or tune with lora, whose adapters are fp32",
            key="model.dtype",
        )


def _check_aggregated(config: Config) -> None:
    how, lora = config.aggregation, "lora" in vars(config.tuning).values()
    if how.lora != "factors" and not lora:
        raise ConfigError(
            f"aggregation.lora={how.lora} is about adapters, and no part has any: set "
            "tuning.bottom, tuning.trunk or tuning.top to lora, or clear aggregation.lora",
            key="aggregation.lora",
        )
    if how.lora == "exact" and config.model.dtype != "fp32":
        raise ConfigError(
            f"aggregation.lora=exact with model.dtype={config.model.dtype}: what the adapters' "
            "rank cannot hold goes into the base weights, and most of it would be rounded away; "
            "set model.dtype=fp32, or aggregation.lora=svd",
            key="aggregation.lora",
        )
    if config.train.sync == "step" and (how.optimizer != "fedavg" or how.lora in ("exact", "svd")):
        raise ConfigError(
            f"train.sync=step keeps clients' ends equal, so that nothing is left to aggregate: "
            f"aggregation.optimizer={how.optimizer} and aggregation.lora={how.lora} must be "
            "fedavg, and factors or ffa; or set train.sync=round",
            key="train.sync",
        )


def _assigned(section: str, names: list[str], value: str) -> str:
    return ", ".join(f"{section}.{name}={value}" for name in names)


def _check_reachable(link: LinkConfig) -> None:
    host, port = split_address(link.bind)
    if link.advertise and _is_wildcard(split_address(link.advertise)[0]):
        raise ConfigError(
            f"link.advertise ({link.advertise!r}) is no address to connect to: set it to the name "
            "by which clients reach the trunk",
            key="link.advertise",
        )
    if link.advertise and port == 0:
        raise ConfigError(
            f"link.bind ({link.bind!r}) takes any free port, which nobody can forward "
            f"link.advertise ({link.advertise!r}) to: give link.bind a port, or clear "
            "link.advertise",
            key="link.bind",
        )
    if _is_wildcard(host) and not link.advertise:
        raise ConfigError(
            f"link.bind ({link.bind!r}) listens on every interface, and clients would be told "
            f"{link.bind.rpartition(':')[0]}:{port or 'PORT'}; set link.advertise to the name "
            "by which they reach it" + ("" if port else ", and give link.bind a port"),
            key="link.bind",
        )


def _is_wildcard(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("*", "0")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return address.is_unspecified or (mapped is not None and mapped.is_unspecified)
