"""How one value is read and refused: types, ranges, enumerations, addresses."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A wrong key or value, in words.

    Attributes
    ----------
    key : str
        The dotted key at fault, such as `train.lr`, or empty.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words, and the test of it."""

    words: str
    holds: Callable[[Any], bool] = lambda value: True
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Rule:
    """Return the rule of an enumeration."""
    return Rule("one of " + ", ".join(choices), lambda value: value in choices, choices)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question for the known word that is nearest, to end a refusal with, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_known(key: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that its registry does not know, as an enumeration refuses it.

    Parameters
    ----------
    key : str
        The dotted key that holds it.
    name : str
        Of a trunk policy, a codec, an aggregator or a sink, which is text for `conf`.
    known : iterable of str
        The registry's names.

    Raises
    ------
    ConfigError
        With all names, and the nearest.
    """
    known = list(known)
    if name not in known:
        words = f"{key} must be one of {', '.join(known)}, got {name!r}"
        raise ConfigError(words + nearest(name, known), key=key)


def setting(default: T, rule: Rule) -> T:
    """Declare a dataclass field with a default and a rule; typed as its default for mypy."""
    made: Any = field(default=default, metadata={"rule": rule})
    return made  # type: ignore[no-any-return]


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[ipv6]:port`; raise ValueError if it is neither."""
    host, colon, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not bare or (":" in bare) != (bare != host) or not port.isdecimal():
        raise ValueError(f"{address!r} is not host:port")
    if int(port) > 65535:
        raise ValueError(f"{address!r} has a port above 65535")
    return bare, int(port)


def _is_address(address: str, *, lowest_port: int) -> bool:
    try:
        return split_address(address)[1] >= lowest_port
    except ValueError:
        return False


POSITIVE = Rule("a positive number", lambda value: value > 0)
NOT_NEGATIVE = Rule("a number, 0 or more", lambda value: value >= 0)
SHARE = Rule("a number in [0, 1]", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Rule("a number in (0, 1]", lambda value: 0 < value <= 1)
BELOW_ONE = Rule("a number in [0, 1)", lambda value: 0 <= value < 1)
BETWEEN = Rule("a number between 0 and 1", lambda value: 0 < value < 1)
UP_TO_HALF = Rule("a number in [0, 0.5]", lambda value: 0 <= value <= 0.5)
COUNT = Rule("a whole number, 1 or more", lambda value: value >= 1)
COUNT_OR_ZERO = Rule("a whole number, 0 or more", lambda value: value >= 0)
WINDOW = Rule(
    "a whole number from 1 to 8 (so many micro-batches of a session may wait for their backward)",
    lambda value: 1 <= value <= 8,
)
PORT_OR_ZERO = Rule("a port up to 65535; 0: none", lambda value: 0 <= value <= 65535)
SEED = Rule("a whole number in [0, 2**32)", lambda value: 0 <= value < 2**32)
CONTEXT = Rule("a whole number, 2 or more (nothing is predicted in one token)", lambda v: v >= 2)
NAME = Rule(
    "a name of letters, digits, - and _",
    lambda value: re.fullmatch(r"[A-Za-z0-9][\w-]*", value, re.ASCII) is not None,
)
"""Of what a registry knows, which `conf` does not; `check_known` refuses the others."""
NAME_FOR_EACH = Rule(
    f"{NAME.words}, or such a name for each crossing",
    lambda value: all(isinstance(name, str) and NAME.holds(name) for name in value.values()),
)
NAME_OR_EMPTY = Rule(f"empty or {NAME.words}", lambda value: value == "" or NAME.holds(value))
NOT_EMPTY = Rule("text that is not empty", lambda value: value != "")
BETAS = Rule("two numbers in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value))
NAMES = Rule("a list of names", all)
DEVICE = Rule(
    "a torch device such as cpu, cuda or cuda:0",
    lambda value: re.fullmatch(r"[a-z]+(:\d+)?", value) is not None,
)
ADDRESS = Rule(
    "host:port, with a port up to 65535", lambda value: _is_address(value, lowest_port=0)
)
ADDRESS_OR_EMPTY = Rule(
    "empty or host:port, with a port from 1 to 65535",
    lambda value: value == "" or _is_address(value, lowest_port=1),
)

_WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "tuple[str, ...]": "a list of names",
    "tuple[float, float]": "two numbers",
    "dict[str, Any]": "a mapping",
}


def checked(value: Any, kind: str, rule: Rule | None, key: str) -> Any:
    """Return `value` as its declared type, or refuse it in words.

    Parameters
    ----------
    value : Any
        What YAML, JSON, an override or a caller gave.
    kind : str
        The annotation of the field, such as `float` or `tuple[str, ...]`.
    rule : Rule | None
        The range or enumeration it must be in.
    key : str
        Its dotted name, for the message.

    Raises
    ------
    ConfigError
        If the type is wrong or the rule does not hold.
    """
    words = rule.words if rule else _WORDS[kind]
    try:
        result = _READERS[kind](value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{key} must be {words}, got {_shown(value)}{_hint(value, kind)}", key=key
        ) from None
    if rule and not rule.holds(result):
        remedy = nearest(str(result), rule.choices)
        raise ConfigError(f"{key} must be {words}, got {_shown(value)}{remedy}", key=key)
    return result


def _shown(value: Any) -> str:
    return "nothing (null)" if value is None else repr(value)


def _hint(value: Any, kind: str) -> str:
    if kind == "str" and isinstance(value, bool | int | float):
        return " (YAML reads it as a number or a boolean: put it in quotes)"
    return ""


def _read_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _read_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _read_float(value: Any) -> float:
    # YAML 1.1 reads 1e-3 (no dot) as text, so text that spells a number is a number.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _read_str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _read_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",")) if value.strip() else ()
    if not isinstance(value, list | tuple):
        raise TypeError
    return tuple(_read_str(name) for name in value)


def _read_pair(value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple):
        raise TypeError
    first, second = (_read_float(number) for number in value)
    return first, second


def _read_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError
    return dict(value)


_READERS: dict[str, Callable[[Any], Any]] = {
    "bool": _read_bool,
    "int": _read_int,
    "float": _read_float,
    "str": _read_str,
    "tuple[str, ...]": _read_names,
    "tuple[float, float]": _read_pair,
    "dict[str, Any]": _read_mapping,
}
