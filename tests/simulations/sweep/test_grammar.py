"""The words of a sweep are those that Hydra's users know."""

from __future__ import annotations

import pytest

from conf.rules import ConfigError
from simulations.sweep.grammar import Interval, parse_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3,3e-3", ["1e-3", "3e-3"]),
        ("1, 2 ,3", ["1", "2", "3"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("[a,b]", ["[a,b]"]),
        ("{x: 1, y: [2,3]},{}", ["{x: 1, y: [2,3]}", "{}"]),
        ("'a,b',c", ["a,b", "c"]),
        ('"/my, data/it\'s"', ["/my, data/it's"]),
        ("/it's/here,/there", ["/it's/here", "/there"]),
        ("['a,b',c],d", ["['a,b',c]", "d"]),
        ("range(3)", ["0", "1", "2"]),
        ("range(1,10,2)", ["1", "3", "5", "7", "9"]),
        ("range(5,0,-2)", ["5", "3", "1"]),
        ("range(0,0.3,0.1)", ["0", "0.1", "0.2"]),
        ("range(2),7", ["0", "1", "7"]),
        ("choice(a,b)", ["a", "b"]),
        ("", [""]),
        ("'',x", ["", "x"]),
        ("off", ["off"]),
    ],
)
def test_values(text: str, values: list[str]) -> None:
    assert parse_values("k", text) == values


@pytest.mark.parametrize(
    ("text", "whole", "log"),
    [
        ("interval(1e-4,1e-2)", False, True),
        ("interval(0.1,0.9)", False, False),
        ("interval(0,100)", True, False),
        ("interval(2,64)", True, True),
        ("interval(-1,1)", True, False),
    ],
)
def test_an_interval_is_by_the_logarithm_if_positive_and_a_decade(
    text: str, whole: bool, log: bool
) -> None:
    span = parse_values("k", text)
    assert isinstance(span, Interval)
    assert (span.whole, span.log) == (whole, log)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[a,b", r"\] is missing"),
        ("'a,b", "' is missing"),
        ("1,,2", "between commas is empty"),
        ("1,", "between commas is empty"),
        ("range(0)", "0 values"),
        ("range(1,2,0)", "step is 0"),
        ("range(1,2,3,4)", "give range"),
        ("range(x)", "not all numbers"),
        ("range(1e9)", "not 1 to"),
        ("interval(2,1)", "lower number first"),
        ("interval(1,2),3", "stands alone"),
        ("interval(0,inf)", "finite"),
    ],
)
def test_what_is_wrong_is_refused_with_the_text(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse_values("train.lr", text)
    assert "train.lr=" in str(refused.value)
