"""What a request may say, and in which words it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from simulations.api.chat import read_chat
from simulations.api.completion import read_completion
from simulations.api.errors import ApiError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "a"}


def refusal(read: Any, body: Any) -> tuple[str | None, str | None, str]:
    """Return parameter, code and words of a refusal."""
    with pytest.raises(ApiError) as caught:
        read(body)
    assert caught.value.status == 400
    return caught.value.param, caught.value.code, caught.value.message


@pytest.mark.parametrize(
    ("change", "param", "code", "words"),
    [
        ({"model": None}, "model", "missing_required_parameter", "is missing"),
        ({"messages": []}, "messages", "invalid_type", "one message or more"),
        ({"messages": ["a"]}, "messages[0]", "invalid_type", "role and content"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role", None, "'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", None, "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "unsupported_parameter",
            "'image_url'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
            "not supported",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format", None, "text"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter", "graft api"),
        ({"store": True}, "store", "unsupported_parameter", "nothing is kept"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", None, "between 0 and 20"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", None, "differs"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "between 1"),
        ({"temperature": 2.5}, "temperature", "invalid_value", "between 0 and 2"),
        ({"temperature": "hot"}, "temperature", "invalid_type", "no number"),
        ({"temperature": float("nan")}, "temperature", "invalid_value", "between"),
        ({"n": True}, "n", "invalid_type", "whole number"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value", "5 strings; at most 4"),
        ({"stop": ""}, "stop", "invalid_value", "empty"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value", "no token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value", "-100 and 100"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None, "stream=true"),
        ({"temprature": 1}, "temprature", "unknown_parameter", "did you mean temperature?"),
    ],
)
def test_a_chat_is_refused_by_its_parameter(
    change: dict[str, Any], param: str, code: str | None, words: str
) -> None:
    found = refusal(read_chat, {**CHAT, **change})
    assert found[0] == param
    assert code is None or found[1] == code
    assert words in found[2]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"prompt": None}, "prompt", "is missing"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": ["a", 1]}, "prompt", "whole numbers"),
        ({"prompt": [[1], []]}, "prompt", "one at least"),
        ({"suffix": "z"}, "suffix", "fill a gap"),
        ({"best_of": 3}, "best_of", "differs from n=1"),
        ({"max_tokens": 0}, "max_tokens", "between 1"),
        ({"logprobs": True}, "logprobs", "whole number"),
        ({"prompt": ["a"] * 70, "n": 2}, "prompt", "140 choices"),
        ({"messages": []}, "messages", "unrecognised"),
    ],
)
def test_a_completion_is_refused_by_its_parameter(
    change: dict[str, Any], param: str, words: str
) -> None:
    found = refusal(read_completion, {**COMPLETION, **change})
    assert found[0] == param
    assert words in found[2]


def test_what_is_null_or_asks_for_nothing_is_as_if_left_out() -> None:
    nothing = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "u",
        "stop": None, "seed": None, "logit_bias": None, "max_tokens": None, "metadata": {"a": "b"},
    }  # fmt: skip
    assert read_chat({**CHAT, **nothing}) == read_chat(CHAT)
    assert read_chat(CHAT).max_tokens is None
    assert read_completion(COMPLETION).max_tokens == 16


def test_text_parts_and_developers_are_what_templates_know() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None}
    messages = [{"role": "developer", "content": parts}, said]
    assert read_chat({**CHAT, "messages": messages}).messages == (
        {"role": "system", "content": "ab"},
        {"role": "assistant", "content": "c"},
    )


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("ab", ("ab",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_has_four_forms(prompt: Any, read: tuple[Any, ...]) -> None:
    assert read_completion({**COMPLETION, "prompt": prompt}).prompts == read


def test_a_body_that_is_no_object_is_refused() -> None:
    assert "an array" in refusal(read_chat, [])[2]
