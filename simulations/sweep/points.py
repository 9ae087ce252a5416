"""The points of a sweep: every combination that was asked for, read by `conf.load`, each once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conf.load import load_config, read_value, to_dict, to_json
from conf.rules import COUNT, ConfigError, checked
from conf.schema import Config
from simulations.sweep.grammar import MOST_VALUES
from simulations.sweep.spec import CLIENTS, SEED, Spec, Values
from simulations.sweep.state import Point

Setting = dict[str, str]
"""Keys and texts that make a point of a sweep's experiment."""


@dataclass(frozen=True, kw_only=True)
class Expanded:
    """All points of a sweep, and what became of what was asked for."""

    points: list[Point]
    configs: list[Config]
    """Of the points, in the same order."""
    keys: list[str]
    """Those with more than one value, without the seed."""
    doubles: int
    """Combinations that said the same as another."""
    excluded: int


def expand(spec: Spec, clients: int) -> Expanded:
    """Return the points of a sweep; all of the first seed come first.

    Parameters
    ----------
    spec : Spec
        What was asked for.
    clients : int
        How many there are if the sweep does not say; 0: as many as the SuperLink has.

    Raises
    ------
    ConfigError
        If a key or a value of any point is wrong, or there is no point.
    """
    loaded = list(_settings(spec, clients))
    settings, configs = [setting for setting, _ in loaded], [config for _, config in loaded]
    counts = [clients_of(spec, setting, clients) for setting in settings]
    unlike: dict[str, int] = {}
    excluded = 0
    for index, config in enumerate(configs):
        if any(_agrees(entry, config, counts[index]) for entry in spec.exclude):
            excluded += 1
        else:
            unlike.setdefault(f"{counts[index]} {to_json(config)}", index)
    chosen = list(unlike.values())
    if not chosen:
        raise ConfigError(f"the sweep has no point: all {excluded} combinations are excluded")
    keys = _swept_keys(spec, [(configs[index], counts[index]) for index in chosen])
    return Expanded(
        points=[
            make_point(number, spec, settings[index], configs[index], counts[index], keys)
            for number, index in enumerate(chosen, start=1)
        ],
        configs=[configs[index] for index in chosen],
        keys=keys,
        doubles=len(settings) - excluded - len(chosen),
        excluded=excluded,
    )


def make_point(
    number: int, spec: Spec, setting: Setting, config: Config, clients: int, keys: Iterable[str]
) -> Point:
    """Return the point of a setting whose configuration was read.

    Parameters
    ----------
    number : int
        From 1, in the sweep.
    spec, setting : Spec, dict
        What was asked for.
    config : Config
        As read.
    clients : int
        How many; 0: as many as the SuperLink has.
    keys : iterable of str
        What is swept.
    """
    return Point(
        id=f"{number:03d}",
        values={key: value_in(config, clients, key) for key in keys},
        seed=config.seed,
        clients=clients,
        overrides=overrides_of(spec, setting),
        rounds=config.train.rounds,
    )


def load_setting(spec: Spec, setting: Setting) -> Config:
    """Return the configuration of a setting, read and checked; a ConfigError names the setting."""
    try:
        return load_config(spec.experiment, overrides_of(spec, setting))
    except ConfigError as error:
        if not setting:
            raise
        words = " ".join(f"{key}={text}" for key, text in setting.items())
        raise ConfigError(f"{error}; at the point {words}", key=error.key) from error


def clients_of(spec: Spec, setting: Setting, default: int) -> int:
    """Return how many clients a setting has; `default` if the sweep does not say."""
    return _count((spec.fixed | setting).get(CLIENTS, default))


def value_in(config: Config, clients: int, key: str) -> Any:
    """Return the value of a dotted key, or the number of clients, as JSON has it."""
    if key == CLIENTS:
        return clients
    value: Any = to_dict(config)
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _settings(spec: Spec, clients: int) -> Iterator[tuple[Setting, Config]]:
    """Every combination with its configuration, those of a seed together."""
    seeds = [{SEED: seed} for seed in spec.grid.get(SEED, [])] or [{}]
    grid = {key: values for key, values in spec.grid.items() if key != SEED}
    axes = [*(_axis({key: values}) for key, values in grid.items()), *map(_axis, spec.zipped)]
    count = math.prod(len(axis) for axis in axes) * len(seeds)
    if count > MOST_VALUES:
        raise ConfigError(f"the grid has {count:,} combinations, more than {MOST_VALUES:,}")
    for seed in seeds:
        if axes or not spec.include:
            for combination in itertools.product(*axes):
                merged = {key: text for part in combination for key, text in part.items()}
                yield from _with_conditions(spec, merged | seed, clients)
        named = (extra for extra in spec.include if SEED not in extra or seed is seeds[0])
        yield from ((seed | extra, load_setting(spec, seed | extra)) for extra in named)


def _axis(lists: Values) -> list[Setting]:
    """Settings that stand side by side: of one key, or of keys that go together."""
    return [dict(zip(lists, texts, strict=True)) for texts in zip(*lists.values(), strict=True)]


def _with_conditions(spec: Spec, setting: Setting, clients: int) -> list[tuple[Setting, Config]]:
    """The setting, or those that the sweep's conditions make of it, one after another."""
    found = [(setting, load_setting(spec, setting))]
    for when in spec.when:
        after: list[tuple[Setting, Config]] = []
        for each, config in found:
            count = clients_of(spec, each, clients)
            if all(_holds(key, texts, config, count) for key, texts in when.condition.items()):
                combinations = itertools.product(*when.then.values())
                made = [each | dict(zip(when.then, texts, strict=True)) for texts in combinations]
                after += [(one, load_setting(spec, one)) for one in made]
            else:
                after.append((each, config))
        found = after
    return found


def _holds(key: str, texts: Iterable[str], config: Config, clients: int) -> bool:
    value = value_in(config, clients, key)
    return any(typed(key, text) == value for text in texts)


def _agrees(entry: Setting, config: Config, clients: int) -> bool:
    return all(_holds(key, [text], config, clients) for key, text in entry.items())


def typed(key: str, text: str) -> Any:
    """Return a value as the configuration reads it, or a number of clients, as JSON has it."""
    if key == CLIENTS:
        return _count(text)
    value = read_value(key, text)
    return list(value) if isinstance(value, tuple) else value


def overrides_of(spec: Spec, setting: Setting) -> list[str]:
    """Return all that a setting's run takes over the sweep's experiment."""
    both = spec.fixed | setting
    return [f"{key}={text}" for key, text in both.items() if key != CLIENTS]


def _count(value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    return int(checked(number, "int", COUNT, CLIENTS)) if number != 0 or value == "0" else 0


def _swept_keys(spec: Spec, points: list[tuple[Config, int]]) -> list[str]:
    """Keys with more than one value, in the order in which they were named."""
    named: list[str] = [*spec.grid]
    for lists in spec.zipped:
        named += lists
    for when in spec.when:  # a single value only follows from the condition
        named += [key for key, texts in when.then.items() if len(texts) > 1]
    named += [key for extra in spec.include for key in extra]
    unlike = []
    for key in dict.fromkeys(named):
        values = {repr(value_in(config, clients, key)) for config, clients in points}
        if key != SEED and len(values) > 1:
            unlike.append(key)
    return unlike
