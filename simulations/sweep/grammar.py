"""The words of a sweep: `a,b,c`, `range(1,10,2)` and `interval(1e-4,1e-2)`, as Hydra has them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from conf.rules import ConfigError

_CLOSING = {"[": "]", "{": "}", "(": ")"}
_CALL = re.compile(r"(range|interval|choice)\((.*)\)", re.S)
DECADE = 10.0
MOST_VALUES = 10_000


@dataclass(frozen=True)
class Interval:
    """A span to sample from."""

    low: float
    high: float
    whole: bool
    """Both ends were written as whole numbers, and so are the samples."""

    @property
    def log(self) -> bool:
        """Whether samples are uniform in the logarithm: positive, and a decade or more."""
        return self.low > 0 and self.high / self.low >= DECADE


def split_top(text: str, where: str) -> list[str]:
    """Split at commas that are outside of brackets and quotes; a ConfigError if one stays open."""
    parts, start, quote = [], 0, ""
    closing: list[str] = []
    for place, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and (closing or not text[start:place].strip()):
            quote = char  # not within a word: it's
        elif char in _CLOSING:
            closing.append(_CLOSING[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char == "," and not closing:
            parts.append(text[start:place].strip())
            start = place + 1
    if quote or closing:
        raise ConfigError(f"{where}: {quote or closing[-1]} is missing in {text!r}")
    return [*parts, text[start:].strip()]


def parse_values(key: str, text: str) -> list[str] | Interval:
    """Return the values that a text stands for: one or several, or a span to sample from.

    Parameters
    ----------
    key : str
        For messages.
    text : str
        As after `KEY=`.

    Raises
    ------
    ConfigError
        If a bracket or a quote stays open, a value between commas is empty, a range has none, or
        an interval is not one.
    """
    where = f"{key}={text}"
    parts = split_top(text, where)
    if len(parts) > 1 and "" in parts:
        raise ConfigError(f"{where}: a value between commas is empty; write '' if that is meant")
    values: list[str] = []
    for part in parts:
        call = _CALL.fullmatch(part)
        if call is None:
            values.append(_unquoted(part))
        elif call.group(1) == "choice":
            values += [_unquoted(each) for each in split_top(call.group(2), where)]
        elif call.group(1) == "range":
            values += _range(split_top(call.group(2), where), where)
        elif len(parts) > 1:
            raise ConfigError(f"{where}: an interval stands alone, without commas around it")
        else:
            return _interval(split_top(call.group(2), where), where)
    return values


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _numbers(texts: list[str], where: str) -> list[float]:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        raise ConfigError(f"{where}: {', '.join(texts)} are not all numbers") from None
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{where}: {', '.join(texts)} are not all finite")
    return numbers


def _range(texts: list[str], where: str) -> list[str]:
    """Values from start up to, and without, stop, as Python's range has them."""
    numbers = _numbers(texts, where)
    if not 1 <= len(numbers) <= 3:
        raise ConfigError(f"{where}: give range(stop), range(start,stop) or range(start,stop,step)")
    start, stop, step = [0.0, numbers[0], 1.0] if len(numbers) == 1 else [*numbers, 1.0][:3]
    if step == 0:
        raise ConfigError(f"{where}: the step is 0")
    count = math.ceil((stop - start) / step - 1e-9)
    if not 0 < count <= MOST_VALUES:
        raise ConfigError(f"{where}: the range has {max(count, 0)} values, not 1 to {MOST_VALUES}")
    whole = all(re.fullmatch(r"[+-]?\d+", text) for text in texts)
    values = (start + index * step for index in range(count))
    return [str(int(value)) if whole else f"{value:.12g}" for value in values]


def _interval(texts: list[str], where: str) -> Interval:
    numbers = _numbers(texts, where)
    if len(numbers) != 2 or numbers[0] >= numbers[1]:
        raise ConfigError(f"{where}: give interval(low,high), the lower number first")
    whole = all(re.fullmatch(r"[+-]?\d+", text) for text in texts)
    return Interval(numbers[0], numbers[1], whole)
