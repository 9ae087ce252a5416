"""Build a `Config` from base.yaml, an experiment and overrides, and write it in other forms.

What is set later wins: base.yaml, then conf/experiment/NAME.yaml, then the overrides. A wrong key
or value is refused with the nearest valid one and the place it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.places import follow_model
from conf.renamed import RENAMED, with_new_names
from conf.rules import ConfigError, checked, nearest
from conf.schema import Config

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent

_SECTIONS: dict[str, Any] = {
    item.name: item.default_factory
    for item in dataclasses.fields(Config)
    if item.default_factory is not dataclasses.MISSING
}
_KINDS = {"experiment": "str", "seed": "int"} | {
    f"{section}.{item.name}": str(item.type)
    for section, kind in _SECTIONS.items()
    for item in dataclasses.fields(kind)
}
_FREE_FORM = "dict[str, Any]"
_UNLIKE: dict[str, type] = {
    _FREE_FORM: list, "tuple[str, ...]": dict, "tuple[float, float]": dict
}  # fmt: skip
"""By the kind of a key, what OmegaConf cannot merge with its default."""


def experiments() -> list[str]:
    """Return the names of the experiments that ship with Graft, sorted."""
    return sorted(path.stem for path in (FOLDER / "experiment").glob("*.yaml"))


def load_config(experiment: str = "demo", overrides: str | list[str] = "") -> Config:
    """Merge base.yaml, an experiment and overrides into a checked configuration.

    Parameters
    ----------
    experiment : str
        A name in conf/experiment, or the path of a YAML file (a run's resolved configuration too).
    overrides : str | list[str]
        `"train.lr=1e-3 cut.bottom=2"`, split as a shell does, so that quotes keep spaces; or a
        list of `key=value`. An override replaces the whole value, a mapping or a list too.

    Raises
    ------
    ConfigError
        If the experiment, a key or a value is wrong: with the nearest valid one and its source.
    """
    path, name = _find(experiment)
    origins: dict[str, str] = {}
    layers = [_read(FOLDER / "base.yaml", {}), _read(path, origins)]
    if path.parent == FOLDER / "experiment" or "experiment" not in layers[1]:
        layers.append(OmegaConf.create({"experiment": name}))
    try:
        merged = OmegaConf.merge(*layers)
        for item in _items(overrides):
            _apply(merged, item, origins)
        tree: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{experiment}: {_first_line(error)}") from error
    try:
        config = _build(tree).check()
    except ConfigError as error:
        source = origins.get(error.key)
        if source is None:
            raise
        raise ConfigError(f"{error} (from {source})", key=error.key) from None
    config, notes = follow_model(config, path.parent.absolute())
    for note in notes:
        logger.warning("%s: %s", path, note)
    return config


def override(config: Config, overrides: str | list[str]) -> Config:
    """Return a configuration with overrides on top, which are as for `load_config`.

    Raises
    ------
    ConfigError
        If a key or a value is wrong: with the nearest valid one.
    """
    origins: dict[str, str] = {}
    merged = OmegaConf.create(to_dict(config))
    try:
        for item in _items(overrides):
            _apply(merged, item, origins)
        tree: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    return _build(tree).check()


def read_value(key: str, text: str) -> Any:
    """Return one value as the configuration reads it in `key=text`.

    Raises
    ------
    ConfigError
        If the key is none of a run's, or the value is not one of its.
    """
    tree = OmegaConf.create({"seed": 0} | {section: {} for section in _SECTIONS})
    _apply(tree, f"{key}={text}", {})
    value = OmegaConf.to_container(tree)
    for name in key.split("."):
        value = value[name]  # type: ignore[call-overload, index]
    if key not in _KINDS:  # inside a mapping whose keys are its own
        return value
    return _checked(key, value)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts, lists and scalars, in the order of the schema."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def to_json(config: Config) -> str:
    """Return the configuration as JSON, from which `from_json` builds an equal one."""
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False)


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML, which `load_config` reads when given its path."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def from_json(text: str) -> Config:
    """Build the configuration that `to_json` wrote.

    Raises
    ------
    ConfigError
        If it is no JSON object, a key is missing or unknown, or a value is wrong.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the configuration is not JSON: {error}") from error
    keys = set(_leaves(tree, "the JSON configuration"))
    missing = sorted(key for key in _KINDS if key not in keys)
    if missing:
        raise ConfigError(
            f"the JSON configuration lacks {', '.join(missing)}: it was not written by this "
            "version of Graft; write it anew with to_json",
            key=missing[0],
        )
    return _build(tree).check()


def from_before(tree: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """Build the configuration that this version or one before it wrote down, with what to tell.

    Keys that were not there yet are as by default, which is how runs were without them.

    Raises
    ------
    ConfigError
        If it is no mapping of sections, a key was never one, or a value is wrong.
    """
    source = "what was written down"
    tree, notes = with_new_names(tree, source)
    keys = set(_leaves(tree, source))
    if new := sorted(key for key in _KINDS if key not in keys):
        notes.append(f"{', '.join(new)} was not written down yet, and is as by default")
    return _build(tree).check(), notes


def _find(experiment: str) -> tuple[Path, str]:
    """Return the file and the name of an experiment given by name or by path."""
    given = Path(experiment).expanduser()
    if given.suffix in (".yaml", ".yml", ".json") or len(given.parts) > 1:
        if not given.is_file():
            raise ConfigError(f"no experiment file {given.absolute()}")
        return given, given.stem
    path = FOLDER / "experiment" / f"{experiment}.yaml"
    if not path.is_file():
        known = experiments()
        raise ConfigError(
            f"unknown experiment {experiment!r}{nearest(experiment, known)}; there are "
            f"{', '.join(known)}, or give the path of a YAML file"
        )
    return path, experiment


def _read(path: Path, origins: dict[str, str]) -> Any:
    """Read one YAML file and record where each of its keys was set."""
    source = str(path.relative_to(FOLDER.parent) if path.is_relative_to(FOLDER) else path)
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    plain, notes = with_new_names(plain, source)
    for note in notes:
        logger.warning("%s: %s", source, note)
    for key in _leaves(plain, source):
        origins[key] = source
        section, _, name = key.rpartition(".")
        value = (plain[section] if section else plain)[name]
        if isinstance(value, _UNLIKE.get(_KINDS[key], ())):
            try:
                _checked(key, value)
            except ConfigError as error:
                raise ConfigError(f"{error} (from {source})", key=key) from None
    return OmegaConf.create(plain)


def _leaves(tree: Any, source: str) -> Iterator[str]:
    """Yield the dotted keys of a tree, refusing those that the schema does not have."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{source} must hold a mapping of sections, got {tree!r}")
    for name, value in tree.items():
        if name not in _SECTIONS:
            yield _known(str(name), source)
        elif not isinstance(value, Mapping):
            raise ConfigError(f"{name} is a section with keys of its own, got {value!r} ({source})")
        else:
            for key in value:
                yield _known(f"{name}.{key}", source)


def _known(key: str, source: str) -> str:
    """Return a dotted key that exists, or refuse it with the nearest one."""
    if key in _KINDS:
        return key
    if key in RENAMED:
        raise ConfigError(f"unknown key {key!r} in {source}: it is {RENAMED[key]} now", key=key)
    section, _, name = key.rpartition(".")
    inside = [known.split(".")[1] for known in _KINDS if known.startswith(f"{section}.")]
    same_name = [known for known in _KINDS if known.split(".")[-1] == name]
    near = difflib.get_close_matches(name, inside, n=1)
    if key in _SECTIONS:
        first = next(known for known in _KINDS if known.startswith(f"{key}."))
        hint = f": it is a section; name one of its keys, such as {first!r}"
    elif near:
        hint = f"; did you mean {f'{section}.{near[0]}'!r}?"
    elif same_name:
        hint = f"; did you mean {same_name[0]!r}?"
    elif inside:
        hint = f"; {section} has {', '.join(inside)}"
    else:
        sections = f"; the sections are {', '.join(_SECTIONS)}"
        hint = nearest(key, [*_KINDS, *_SECTIONS]) or sections
    raise ConfigError(f"unknown key {key!r} in {source}{hint}", key=key)


def _items(overrides: str | list[str]) -> list[str]:
    if not isinstance(overrides, str):
        return list(overrides)
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides {overrides!r} cannot be split: {error}") from error


def _apply(merged: Any, item: str, origins: dict[str, str]) -> None:
    """Set one `key=value` in the merged tree."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r} is not key=value")
    source = f"override {item!r}"
    if key == "experiment":
        raise ConfigError(f"{source}: an experiment is not overridden; name it as the experiment")
    inside = next((known for known, kind in _KINDS.items() if kind == _FREE_FORM
                   and key.startswith(f"{known}.")), "")  # fmt: skip
    known = inside or _known(key, source)
    try:
        # Text is taken as it stands: YAML would turn `off` into a boolean and 2020 into a number.
        value = text if _KINDS[known] == "str" else OmegaConf.create(f"value: {text}").value
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source}: the value is not YAML: {_first_line(error)}") from error
    origins[known] = source
    if inside:
        _spread(merged, inside)
    OmegaConf.update(merged, key, value, merge=False)


def _spread(merged: Any, key: str) -> None:
    """Write a mapping out where one value stands for all of it, as in `link.codec=int4`."""
    value = OmegaConf.select(merged, key)
    if not OmegaConf.is_dict(value) and value is not None:
        OmegaConf.update(merged, key, _whole(key, value), merge=False)


def _whole(key: str, value: Any) -> Any:
    """What its section makes of one value that stands for a mapping."""
    section, _, name = key.rpartition(".")
    return getattr(_SECTIONS[section](**{name: value}), name)


def _checked(key: str, value: Any) -> Any:
    """One value as its declared type, or refused in words."""
    section, _, name = key.rpartition(".")
    if _KINDS[key] == _FREE_FORM and isinstance(value, str):
        value = _whole(key, value)
    item = {each.name: each for each in dataclasses.fields(_SECTIONS.get(section, Config))}[name]
    return checked(value, str(item.type), item.metadata.get("rule"), key)


def _build(tree: Mapping[str, Any]) -> Config:
    """Make the dataclasses of a tree whose keys are known."""
    return Config(
        **{name: _SECTIONS[name](**value) if name in _SECTIONS else value
           for name, value in tree.items()}
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
