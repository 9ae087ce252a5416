"""a request for a completion: its prompts and parameters, checked"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simulations.api.errors import unsupported, wrong
from simulations.api.fields import Fields
from simulations.api.wanted import MOST_CHOICES, MOST_LOGPROBS, Wanted, shared

DEFAULT_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Completion(Wanted):
    """A request for completions of one or several prompts."""

    prompts: tuple[str | tuple[int, ...], ...]
    """Each as text, or as token ids."""
    echo: bool = False


def read_completion(body: Any) -> Completion:
    """Read a request, or say what is wrong with it.

    Raises
    ------
    ApiError
        With the parameter that is wrong, not supported, or not known.
    """
    fields = Fields(body)
    fields.only("suffix", "", why="asks to fill a gap; this model only continues")
    best_of = fields.whole("best_of", None, 1, MOST_CHOICES)
    echo = fields.flag("echo")
    completion = Completion(
        prompts=_prompts(fields.take("prompt")),
        echo=echo,
        max_tokens=fields.whole("max_tokens", DEFAULT_TOKENS, 0 if echo else 1, 2**31),
        top_logprobs=fields.whole("logprobs", None, 0, MOST_LOGPROBS),
        **shared(fields),
    )
    fields.finish()
    _check(completion, best_of)
    return completion


def _check(completion: Completion, best_of: int | None) -> None:
    if best_of not in (None, completion.n):
        raise unsupported("best_of", f"{best_of} differs from n={completion.n}; all are returned")
    choices = len(completion.prompts) * completion.n
    if choices > MOST_CHOICES:
        raise wrong(
            "prompt",
            f"{len(completion.prompts)} prompts with n={completion.n} are {choices} choices; a "
            f"request may ask for {MOST_CHOICES}",
        )


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A string, strings, token ids, or lists of them."""
    if value is None:
        raise wrong("prompt", "is missing", "missing_required_parameter")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise wrong("prompt", "is to be a string, an array of strings, or token ids, and not empty")
    if all(isinstance(one, str) for one in value):
        return tuple(value)
    if all(isinstance(one, list) for one in value):
        return tuple(_ids(one) for one in value)
    return (_ids(value),)


def _ids(value: list[Any]) -> tuple[int, ...]:
    if not value or not all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        raise wrong("prompt", "token ids are to be whole numbers, one at least", "invalid_type")
    return tuple(value)
