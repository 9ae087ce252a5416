"""Settings of runs: what differs from the defaults, and between runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from conf.load import to_dict
from conf.renamed import with_new_names
from conf.schema import Config
from conf.sections.link import in_words

APART = ("seed", "output.", "tracking.")
"""Keys that make no other setting: repetitions of one differ in them."""

LONGEST = 48
"""Characters of a setting that can stand for a run's name."""


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by key, by today's names; what is free in form stays whole."""
    config, _ = with_new_names(config, "the run's configuration")
    return {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in config.items()
        for key, value in (values if isinstance(values, dict) else {"": values}).items()
    }


def changed(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return key, value and default of what is not as by default; a key that is no more: None."""
    default = flat(to_dict(Config()))
    return [
        (key, value, default.get(key))
        for key, value in flat(config).items()
        if key not in default or value != default[key]
    ]


def differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys in which runs differ: of the configuration, and `clients`."""
    keys = dict.fromkeys(key for run in runs for key in settings(run))
    return [key for key in keys if len({shown(settings(run).get(key)) for run in runs}) > 1]


def settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run was set to: its configuration, and how many clients it had."""
    return {**run["config"], "clients": run["summary"]["clients"]}


def setting_of(run: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return in words what a run has of its own among `keys`, its seed left out."""
    told = settings(run)
    words = [f"{key}={shown(told.get(key))}" for key in keys if not key.startswith(APART)]
    return ", ".join(words) or "the one setting"


def labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what to call each run: its setting, its seed added if need be; or else its name."""
    keys, names = differing(runs), [run["name"] for run in runs]
    told = [setting_of(run, keys) for run in runs]
    seeded = [f"{each}, seed={run['seed']}" for each, run in zip(told, runs, strict=True)]
    distinct = (found for found in (told, seeded) if len(set(found)) == len(found) > 1)
    return next((found for found in distinct if max(map(len, found)) <= LONGEST), names)


def shown(value: Any) -> str:
    """Return a value as YAML's flow style would have it, codecs in words."""
    value = in_words(value)
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else json.dumps(value, ensure_ascii=False)
