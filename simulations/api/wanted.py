"""what a request asks for, whichever endpoint it came to: sampling, limits, log-probabilities"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simulations.api.errors import unsupported, wrong
from simulations.api.fields import Fields

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 4, 20
NOWHERE = "is not supported by graft api, and leaving it out would change what you asked for"
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key")
"""Of OpenAI's own bookkeeping: they do not change an answer."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What chat and completion have in common."""

    model: str
    max_tokens: int | None
    """None: up to the end of the context."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """How many beside the chosen token's; None: no log-probabilities at all."""
    stream: bool = False
    include_usage: bool = False


def shared(fields: Fields) -> dict[str, Any]:
    """Read what both endpoints have, but for the maximum of tokens and log-probabilities."""
    for name in IGNORED:
        fields.take(name)
    fields.only("store", False, why="asks to keep the answer; nothing is kept here")
    stream = fields.flag("stream")
    return {
        "model": fields.text("model"),
        "temperature": fields.number("temperature", 1.0, 0, 2),
        "top_p": fields.number("top_p", 1.0, 0, 1),
        "top_k": fields.whole("top_k", 0, 0, 1_000_000),
        "repetition_penalty": fields.number("repetition_penalty", 1.0, 0.01, 100),
        "frequency_penalty": fields.number("frequency_penalty", 0.0, -2, 2),
        "presence_penalty": fields.number("presence_penalty", 0.0, -2, 2),
        "logit_bias": _bias(fields.take("logit_bias", {})),
        "n": fields.whole("n", 1, 1, MOST_CHOICES),
        "seed": fields.whole("seed", None, -(2**63), 2**63 - 1),
        "stop": _stop(fields.take("stop", [])),
        "stream": stream,
        "include_usage": _include_usage(fields.take("stream_options"), stream),
    }


def _stop(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(one, str) for one in stops):
        raise wrong("stop", "is to be a string or an array of strings", "invalid_type")
    if len(stops) > MOST_STOPS:
        raise wrong("stop", f"{len(stops)} strings; at most {MOST_STOPS} are looked for")
    if not all(stops):
        raise wrong("stop", "an empty string would stop at once; leave it out")
    return tuple(stops)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise wrong("logit_bias", "is to be an object of token ids and numbers", "invalid_type")
    found = {}
    for token, bias in value.items():
        if not str(token).isdecimal():
            raise wrong("logit_bias", f"{token!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise wrong("logit_bias", f"{bias!r} of token {token} is not between -100 and 100")
        found[int(token)] = float(bias)
    return found


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise wrong("stream_options", "is allowed only with stream=true")
    if not isinstance(value, Mapping):
        raise wrong("stream_options", "is to be an object", "invalid_type")
    options = Fields(value)
    wanted = options.flag("include_usage")
    options.only("include_obfuscation", False, True, why=NOWHERE)
    options.finish()
    return wanted


def one_of(fields: Fields, *names: str) -> int | None:
    """Return the one maximum that is given under one of several names."""
    given = {name: fields.whole(name, None, 1, 2**31) for name in names}
    found = {name: value for name, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        raise unsupported(names[0], f"differs from {names[1]}; give one of them")
    return next(iter(found.values()), None)
