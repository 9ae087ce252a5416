"""What a sweep asks for: from a command line, or from a YAML file; not yet its points."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from conf.load import FOLDER, experiments
from conf.rules import ConfigError, nearest
from simulations.sweep.grammar import Interval, parse_values

CLIENTS, SEED = "clients", "seed"
SHIPPED = FOLDER / "sweep"
Values = dict[str, list[str]]
"""Keys, and the texts that each takes."""
_KEYS = (
    "name", "experiment", "fixed", "grid", "zip", "seeds", "clients", "when", "include", "exclude",
    "plot", "search",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class When:
    """Keys that are swept only where others have certain values."""

    condition: Values
    then: Values


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A sweep as it was asked for. Values are texts, as on a command line."""

    name: str
    experiment: str
    fixed: dict[str, str] = field(default_factory=dict)
    grid: Values = field(default_factory=dict)
    zipped: tuple[Values, ...] = ()
    """In each, all lists are of one length, and go together."""
    when: tuple[When, ...] = ()
    include: tuple[dict[str, str], ...] = ()
    exclude: tuple[dict[str, str], ...] = ()
    spans: dict[str, Interval] = field(default_factory=dict)
    """To be sampled from."""
    plot: tuple[str, ...] = ()
    search: int = 0
    """How many points are sampled; 0: the whole grid is run."""


def shipped() -> list[str]:
    """Return the names of the sweeps that ship with Graft, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_spec(what: str, changes: Sequence[str] = (), clients: str = "") -> Spec:
    """Return the sweep that a command line asks for.

    Parameters
    ----------
    what : str
        An experiment, by name or file; or a sweep's file, or the name of one that ships. A name
        that both have is the sweep where it stands alone, and the experiment with changes.
    changes : sequence of str
        `KEY=V1,V2`: swept; `KEY=V`: fixed. They replace what a sweep's file says of a key.
    clients : str
        Numbers of clients, in the same words.
    """
    path = _sweep_file(what, bool(changes))
    spec = _from_file(path) if path else Spec(name=_stem(what), experiment=_absolute(what))
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise ConfigError(f"{change!r} is not KEY=VALUE or KEY=V1,V2")
        spec = _changed(spec, key, text)
    return _changed(spec, CLIENTS, clients) if clients else spec


def _sweep_file(what: str, changed: bool) -> Path | None:
    """The sweep's file, if `what` names one."""
    if what in shipped() and not (changed and what in experiments()):
        return SHIPPED / f"{what}.yaml"
    if not what.endswith((".yaml", ".yml")):
        if what not in experiments() and len(Path(what).parts) == 1:
            known = [*experiments(), *shipped()]
            raise ConfigError(
                f"neither an experiment nor a sweep is called {what!r}{nearest(what, known)}; "
                f"experiments: {', '.join(experiments())}; sweeps: {', '.join(shipped())}"
            )
        return None
    given = Path(what).expanduser()
    if not given.is_file() and given.parts[-3:-1] == ("conf", "sweep"):
        given = SHIPPED / given.name  # from whatever folder
    if not given.is_file():
        raise ConfigError(f"no file {given.absolute()}; sweeps that ship: {', '.join(shipped())}")
    own = set(_KEYS) - {"experiment"}  # which a run's configuration has, too
    return given if own & set(_tree(given)) else None


def _stem(what: str) -> str:
    return Path(what).stem if Path(what).suffix else what


def _absolute(experiment: str) -> str:
    """An experiment's file by its absolute path: Flower runs the app in another folder."""
    given = Path(experiment).expanduser()
    return str(given.absolute()) if given.suffix or len(given.parts) > 1 else experiment


def _changed(spec: Spec, key: str, text: str) -> Spec:
    """The sweep with one key swept or fixed anew; in a grid it keeps its place."""
    for part, lists in (("zip", spec.zipped), ("when", [each.then for each in spec.when])):
        if any(key in each for each in lists):
            raise ConfigError(
                f"{key} is in `{part}` of the sweep's file, where it goes with other keys: change "
                "it there"
            )
    values = parse_values(key, text)
    grid = {name: each for name, each in spec.grid.items() if name != key}
    fixed = {name: value for name, value in spec.fixed.items() if name != key}
    spans = {name: span for name, span in spec.spans.items() if name != key}
    if isinstance(values, Interval):
        spans[key] = values
    elif len(values) == 1:
        fixed[key] = values[0]
    else:
        grid = spec.grid | {key: values}
    return replace(spec, fixed=fixed, grid=grid, spans=spans)


class _Loader(yaml.BaseLoader):
    """Refuses a key that a mapping has twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _tree(path: Path) -> dict[str, Any]:
    """A YAML file with every scalar as the text that stands there: `off` is no boolean."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return _mapping(tree, str(path))


def _from_file(path: Path) -> Spec:
    tree, source = _tree(path), str(path.relative_to(FOLDER.parent)
                                    if path.is_relative_to(FOLDER) else path)  # fmt: skip
    for key in tree:
        if key not in _KEYS:
            raise ConfigError(
                f"unknown key {key!r} in {source}{nearest(key, _KEYS)}; a sweep has "
                f"{', '.join(_KEYS)} (what a run has goes below fixed or grid)"
            )
    if "experiment" not in tree:
        raise ConfigError(f"{source} names no experiment; there are {', '.join(experiments())}")
    experiment = _text(tree["experiment"], f"{source}: experiment")
    beside = (path.parent / experiment).absolute()
    name = _text(tree.get("name", path.stem), f"{source}: name")
    if Path(name).name != name:
        raise ConfigError(f"{source}: name is a folder's, without /; got {name!r}")
    spec = Spec(
        name=name,
        experiment=str(beside) if beside.is_file() else _absolute(experiment),
        fixed={key: _value(each) for key, each in _part(tree, "fixed", source).items()},
        zipped=tuple(_zip(each, source) for each in _list(tree, "zip", source)),
        when=tuple(_when(each, source) for each in _list(tree, "when", source)),
        include=tuple(_point(each, source) for each in _list(tree, "include", source)),
        exclude=tuple(_point(each, source) for each in _list(tree, "exclude", source)),
        plot=tuple(_text(each, source) for each in _list(tree, "plot", source)),
        search=_count(tree.get("search", "0"), source),
    )
    grid = _part(tree, "grid", source)
    own = {key: tree[name] for key, name in ((CLIENTS, CLIENTS), (SEED, "seeds")) if name in tree}
    _check_once([spec.fixed, grid, own, *spec.zipped], source)
    grid |= own
    spans = {key: _swept(key, each) for key, each in grid.items()}
    return replace(
        spec,
        grid={key: each for key, each in spans.items() if isinstance(each, list)},
        spans={key: each for key, each in spans.items() if isinstance(each, Interval)},
    )


def _check_once(parts: Sequence[Mapping[str, Any]], source: str) -> None:
    """Refuse a key that is fixed and swept, or swept twice: one would silently hide the other."""
    named = [key for part in parts for key in part]
    if twice := [key for key in dict.fromkeys(named) if named.count(key) > 1]:
        raise ConfigError(
            f"{source}: {twice[0]} is there twice among fixed, grid and zip, seeds and clients: "
            "leave one"
        )


def _swept(key: str, value: Any) -> list[str] | Interval:
    """A list's items as they stand, or a text in the words of the command line."""
    if isinstance(value, list):
        if not value:
            raise ConfigError(f"{key} is swept over an empty list")
        return [_value(each) for each in value]
    return parse_values(key, _value(value))


def _zip(value: Any, source: str) -> Values:
    lists = {key: _swept(key, each) for key, each in _mapping(value, f"{source}: zip").items()}
    plain = {key: each for key, each in lists.items() if isinstance(each, list)}
    if not lists or len(plain) < len(lists):
        raise ConfigError(f"{source}: each of `zip` has keys with lists, got {value!r}")
    lengths = {key: len(each) for key, each in plain.items()}
    if len(set(lengths.values())) != 1:
        words = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise ConfigError(f"{source}: lists that are zipped must be of one length; {words}")
    return plain


def _when(value: Any, source: str) -> When:
    tree = _mapping(value, f"{source}: when")
    if set(tree) != {"if", "then"}:
        raise ConfigError(f"{source}: each of `when` has `if` and `then`, got {', '.join(tree)}")
    parts = {
        name: {key: _swept(key, each) for key, each in _mapping(tree[name], source).items()}
        for name in ("if", "then")
    }
    for part in parts.values():
        for key, each in part.items():
            if isinstance(each, Interval):
                raise ConfigError(f"{source}: when: {key} cannot be an interval")
    return When(condition=parts["if"], then=parts["then"])  # type: ignore[arg-type]


def _point(value: Any, source: str) -> dict[str, str]:
    tree = _mapping(value, f"{source}: include and exclude")
    return {("seed" if key == "seeds" else key): _value(each) for key, each in tree.items()}


def _part(tree: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    return _mapping(tree.get(key) or {}, f"{source}: {key}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must hold keys and values, got {value!r}")
    return {str(key): each for key, each in value.items()}


def _list(tree: Mapping[str, Any], key: str, source: str) -> list[Any]:
    value = tree.get(key) or []
    if not isinstance(value, list):
        raise ConfigError(f"{source}: {key} must be a list, got {value!r}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where} must be a text, got {value!r}")
    return value


def _count(value: Any, source: str) -> int:
    if not isinstance(value, str) or not value.isdecimal():
        raise ConfigError(f"{source}: search must be a whole number of points, got {value!r}")
    return int(value)


def _value(value: Any) -> str:
    """A value of a YAML file as it is written on a command line: lists and mappings in flow."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_inner(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_inner(each) for each in value) + "]"
    return str(value)


def _inner(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value) is None:
        return "'" + value.replace("'", "''") + "'"
    return _value(value)
