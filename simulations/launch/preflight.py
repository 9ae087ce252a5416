"""Finds a run's mistakes before Flower is started, which takes its time."""

from __future__ import annotations

import os
from pathlib import Path

from conf.load import load_config
from conf.rules import ConfigError, split_address
from conf.schema import Config, DataConfig, FederationConfig, LinkConfig, RuntimeConfig
from flower_app.runs.folders import make_parent, runs_folder
from simulations.launch.machine import MEBIBYTE, is_free

FLOWERS_CLIENTS = 2
"""SuperNodes that Flower simulates if nobody says how many."""
COUNTED_MB = 64
"""Files up to this size are read beforehand, to see that their documents suffice."""


def check_run(experiment: str, overrides: str = "", clients: int = 0) -> Config:
    """Check what a simulated run needs of this machine; a ValueError says what is wrong.

    Parameters
    ----------
    experiment, overrides : str
        The run's configuration.
    clients : int
        Simulated clients; 0: Flower's default.

    Returns
    -------
    Config
        With the folder in place of `last:NAME`.
    """
    return check_config(load_config(experiment, overrides), clients)


def check_config(config: Config, clients: int = 0) -> Config:
    """Do the same for a configuration that was loaded before.

    Parameters
    ----------
    config : Config
        The run's.
    clients : int
        As in `check_run`.
    """
    count = clients or FLOWERS_CLIENTS
    _check_clients(config.federation, count)
    _check_data(config.data)
    make_parent(runs_folder(config.output.folder))
    if config.link.transport == "stream":
        _check_link(config.link)
    _check_metrics(config.runtime)
    return _check_contents(config, count)


def check_deployed(config: Config) -> Config:
    """Check of a run what does not depend on the machine: SuperLink and nodes have their own.

    Parameters
    ----------
    config : Config
        The run's.
    """
    from flower_app.build import num_blocks
    from flower_app.check import check_names
    from models import Cut

    check_names(config)
    if config.model.scratch and (blocks := num_blocks(config)) is not None:
        Cut(bottom=config.cut.bottom, top=config.cut.top).ranges(blocks)
    return config


def _check_contents(config: Config, clients: int) -> Config:
    """Check what it takes torch to read: not for a misspelt key."""
    from flower_app.build import num_blocks, resolve_model
    from flower_app.check import check_extras, check_names
    from models import Cut

    check_names(config)
    check_extras(config)
    _check_exists("model.tokenizer", config.model.tokenizer)
    config = resolve_model(config)
    blocks = num_blocks(config)
    if blocks is not None:
        Cut(bottom=config.cut.bottom, top=config.cut.top).ranges(blocks)
    _check_devices(config.runtime)
    if not config.model.path.endswith(".gguf"):  # which takes reading it
        from flower_app.data.text import load_tokenizer

        load_tokenizer(config.model)
    _check_documents(config, clients)
    return config


def _check_clients(federation: FederationConfig, clients: int) -> None:
    if federation.min_clients > clients:
        raise ConfigError(
            f"federation.min_clients={federation.min_clients} waits for more clients than the "
            f"{clients} that are simulated: start more (--clients {federation.min_clients}) or "
            "lower it",
            key="federation.min_clients",
        )


def _check_data(data: DataConfig) -> None:
    if data.central_path:
        _check_file("data.central_path", Path(data.central_path).expanduser())
    if data.source != "files":
        return
    if not data.path:
        raise ConfigError(
            "data.source=files needs data.path in a simulation: nodes that bring files of their "
            "own are a deployment's (docs/deployment.md)",
            key="data.path",
        )
    _check_file("data.path", Path(data.path).expanduser())


def _check_link(link: LinkConfig) -> None:
    for name in ("certificate", "key"):
        if value := getattr(link, name):
            _check_file(f"link.{name}", Path(value))
    host, port = split_address(link.bind)
    if port and not is_free(host, port):
        raise ConfigError(
            f"link.bind={link.bind}: another program has this port, or the address is not this "
            "machine's; choose a free port, or port 0 for any",
            key="link.bind",
        )


def _check_metrics(runtime: RuntimeConfig) -> None:
    host, port = runtime.metrics_host, runtime.metrics_port
    if port and not is_free(host, port):
        raise ConfigError(
            f"runtime.metrics_port={port}: another program has this port, or {host} is no address "
            "of this machine; choose a free port, runtime.metrics_host=127.0.0.1, or port 0 for "
            "no metrics",
            key="runtime.metrics_port",
        )


def _check_devices(runtime: RuntimeConfig) -> None:
    import torch

    there = torch.cuda.device_count()
    for name in ("trunk_device", "client_device"):
        try:
            device = torch.device(getattr(runtime, name))
        except RuntimeError as error:
            known = str(error).splitlines()[0]
            raise ConfigError(f"runtime.{name}: {known}", key=f"runtime.{name}") from error
        if device.type == "cuda" and (device.index or 0) >= there:
            raise ConfigError(
                f"runtime.{name}={device}: torch {torch.__version__} sees {there} CUDA devices on "
                f"this machine; set runtime.{name}=cpu, or install a torch for your driver",
                key=f"runtime.{name}",
            )


def _check_documents(config: Config, clients: int) -> None:
    """See that the data can be read and divided among so many, where that takes seconds at most."""
    from flower_app.data.partition import take_partition
    from flower_app.data.sources import load_rows

    data = config.data
    if data.source == "builtin" or (
        data.source == "files" and _size(Path(data.path).expanduser()) <= COUNTED_MB * MEBIBYTE
    ):
        take_partition(load_rows(data), data, partition=0, partitions=clients, seed=config.seed)


def _check_exists(key: str, value: str) -> None:
    """Refuse what is written as a path and is not there; other names are the hub's to judge."""
    path = Path(value).expanduser()
    if value.startswith(("/", "~", "./", "../")) and not path.exists():
        raise ConfigError(f"{key} {path} does not exist", key=key)


def _check_file(key: str, path: Path) -> None:
    if not path.is_absolute():
        raise ConfigError(
            f"{key} is the relative path '{path}', and Flower does not run the app in this "
            f"folder; give an absolute path, such as {path.absolute()}",
            key=key,
        )
    if not path.exists():
        raise ConfigError(f"{key} {path} does not exist", key=key)
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise ConfigError(f"{key} {path} cannot be read by this user", key=key)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
