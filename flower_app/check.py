"""Asks the registries for what a configuration names: `conf` knows only the form of these names."""

from __future__ import annotations

from conf.rules import check_known
from conf.schema import Config
from flower_app.runs.sinks import registry as sinks
from strategies.aggregate.aggregator import find_aggregator
from strategies.engine.policies.registry import find_policy
from strategies.transport.codec.registry import find_codec


def check_names(config: Config) -> None:
    """Refuse a policy, codec, aggregator or sink that nobody offers, with the nearest one.

    Raises
    ------
    ConfigError
        At the first such name.
    """
    find_policy(config.train.strategy)
    find_codec(config.link.dtype)
    find_aggregator(config.aggregation.lora)
    for sink in config.tracking.sinks:
        check_known("tracking.sinks", sink, sinks.names())
