"""Asks the registries for what a configuration names: `conf` knows only the form of these names."""

from __future__ import annotations

from importlib.util import find_spec

from conf.registry import declares
from conf.rules import ConfigError, check_known
from conf.schema import Config
from flower_app.runs.sinks import registry as sinks


def check_names(config: Config) -> None:
    """Refuse a policy, codec, aggregator, defence or sink that nobody offers, with the nearest one.

    The registries import torch, so they are asked only for names that no source declares.

    Raises
    ------
    ConfigError
        At the first such name.
    """
    if not declares("strategies.engine.policies", config.train.strategy):
        from strategies.engine.policies.registry import find_policy

        find_policy(config.train.strategy)
    for way, name in config.link.codec.items():
        if not declares("strategies.transport.codec", name):
            from strategies.transport.codec.registry import find_codec

            find_codec(name, f"link.codec.{way}")
    if not declares("strategies.aggregate", config.aggregation.lora):
        from strategies.aggregate.aggregator import find_aggregator

        find_aggregator(config.aggregation.lora)
    if config.aggregation.robust != "none":
        from strategies.aggregate.robust.registry import check_enough

        check_enough(config.aggregation, config.federation)
    defence = config.privacy.defence
    if defence != "none" and not declares("flower_app.client.defences", defence):
        from flower_app.client.defences.registry import find_defence

        find_defence(defence)
    for sink in config.tracking.sinks:
        check_known("tracking.sinks", sink, sinks.names())


def check_extras(config: Config) -> None:
    """Refuse what needs a library that is not installed; `ConfigError` with the extra."""
    for sink in config.tracking.sinks:
        sinks.check_installed(sink)
    if config.runtime.metrics_port and find_spec("prometheus_client") is None:
        raise ConfigError(
            f"runtime.metrics_port={config.runtime.metrics_port} needs prometheus_client, which is "
            "not installed: pip install 'graft[prometheus]', or set runtime.metrics_port=0",
            key="runtime.metrics_port",
        )
