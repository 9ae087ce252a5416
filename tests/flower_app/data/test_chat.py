"""What counts as an assistant turn, whatever the template, the parts and the columns beside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from flower_app.data.chat import encode_chat
from flower_app.data.client import load_client_data
from flower_app.data.examples import Encoded
from flower_app.data.refusals import DataError
from flower_app.data.sources import load_rows
from flower_app.data.text import encode
from tests.flower_app.data.helpers import (
    CHAT,
    byte_tokenizer,
    fast_tokenizer,
    files_config,
    learned_text,
    write_jsonl,
)

PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
THINK = "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
# Reasoning is kept in the last answer only, as Qwen3 and DeepSeek do.
FORGETS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end>{% endfor %}"
)
DROPS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"
)
DEFAULT = (
    "{% if messages[0].role != 'system' %}<system>Be kind.<end>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
)
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
)


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any = "yo", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def said(turns: list[dict[str, Any]], template: str, **beside: Any) -> str:
    """What is learned, alike with a fast and a slow tokenizer."""
    found = [
        learned_text(encode_chat(turns, tokenizer, **beside), tokenizer)
        for tokenizer in (fast_tokenizer(template), byte_tokenizer(template))
    ]
    assert found[0] == found[1]
    return found[0]


MARKS = [
    ("{% generation %}", "{% endgeneration %}"), ("{%- generation -%}", "{%- endgeneration -%}"),
    ("{%generation%}", "{%endgeneration%}"), ("{%-generation-%}", "{%- endgeneration %}"),
    ("{% generation -%}", "{%- endgeneration %}"), ("{%-  generation  %}", "{% endgeneration -%}"),
]  # fmt: skip
TALKS = [
    [user(), answer()],
    [answer("first"), user(), answer("then")],
    [user(), answer("<think>a</think>b"), user(), answer("<think>c</think>d")],
    [user(), answer("one"), answer("two")],
    [user(), answer(), user("no answer")],
]


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("turns", TALKS)
def test_the_marks_of_a_template_decide_as_in_transformers(
    marks: tuple[str, str], turns: list[dict[str, Any]]
) -> None:
    template = (
        "{%- for m in messages %}{{- '<' + m.role + '>' }}{%- if m.role == 'assistant' %}"
        "{%- set c = m.content if loop.last else m.content.split('</think>')[-1] %}"
        + marks[0] + "{{- c }}" + marks[1] + "{{- '<end>' }}"
        "{%- else %}{{- m.content + '<end>' }}{%- endif %}{%- endfor %}" + PROMPT
    )  # fmt: skip
    tokenizer = fast_tokenizer(template)
    plain = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    found = encode_chat(turns, tokenizer)

    assert found.ids == plain["input_ids"]
    assert found.learned == [bool(mark) for mark in plain["assistant_masks"]]
    assert any(found.learned)
    assert said(turns, template) == learned_text(found, tokenizer)


@pytest.mark.parametrize(
    ("template", "turns", "learned"),
    [
        (CHAT, [answer("first"), user(), answer("then")], "first\n|then\n|"),
        (CHAT, [user(), answer("one"), answer("two")], "one\n|two\n|"),
        (CHAT, [user(), answer(), user("no answer")], "yo\n|"),
        (CHAT, [user(), answer(), user(), answer("")], "yo\n|"),
        (CHAT, [user()], ""),
        (DEFAULT + PROMPT, [user(), answer()], "yo<end>|"),
        (DEFAULT + PROMPT, [answer(), user(), answer("more")], "yo<end>|more<end>|"),
        (FORGETS + PROMPT, [user(), answer("<think>a</think>b"), user(),
         answer("<think>c</think>d")], "b<end>|<think>c</think>d<end>|"),
        (FORGETS + THINK, [user(), answer("<think>\na</think>b"), user(),
         answer("<think>\nc</think>d")], "b<end>|c</think>d<end>|"),
        (DROPS + THINK, [user(), answer("<think>a</think>b"), user(), answer("<that>")],
         "b<end>|<that><end>|"),
        (DROPS + THINK, [answer("b"), user(), answer("c")], "b<end>|c<end>|"),
    ],
)  # fmt: skip
def test_turns_are_told_apart_without_marks(
    template: str, turns: list[dict[str, Any]], learned: str
) -> None:
    # A run of learned tokens ends in |; a turn that follows another at once has its header between.
    assert said(turns, template) == learned


def part(text: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": text}]


PRINTS = [
    "{{ m.content }}", "{{ m.content | string }}", "{{ m.content | tojson }}",
    "{{ m.content + '' }}", "{% for p in m.content %}{{ p }}{% endfor %}",
    "{% if m.content is string %}{{ m.content }}{% endif %}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
    "{% endfor %}{% endif %}",
]  # fmt: skip


@pytest.mark.parametrize("prints", PRINTS)
def test_parts_are_rendered_or_joined_and_never_printed(prints: str) -> None:
    template = "{% for m in messages %}<{{ m.role }}>" + prints + "<end>{% endfor %}" + PROMPT
    content = [*part("It's "), *part('"me"', "output_text")]
    shown = '"It\'s \\"me\\""' if "tojson" in prints else 'It\'s "me"'
    assert said([user(part("Hi")), answer(content)], template) == f"{shown}<end>|"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([*part("x"), {"type": "image_url", "image_url": {"url": "secret"}}], "got image_url"),
        ([{"type": "secret"}], "got something else"),
        ([["secret"]], "got something else"),
        ({"secret": 1}, "content must be text or a list of parts, got dict"),
    ],
)
def test_content_that_is_no_text_is_refused(content: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        encode_chat([user(content), answer()], byte_tokenizer(CHAT))
    assert "secret" not in str(caught.value)
    assert "message 1 of 2" in str(caught.value)


def test_a_call_without_words_is_learned_as_the_template_writes_it() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    written = '{"name": "f", "arguments": {"a": 1}}<end>|'
    for turn in (answer(None, tool_calls=[call]), {"role": "assistant", "tool_calls": [call]}):
        turns = [user(), turn, {"role": "tool", "content": "2"}, answer("two")]
        assert said(turns, CALLS + PROMPT) == written + "two<end>|"
    picky = CALLS.replace("{% if m.tool_calls %}", "{{ m.content + '' }}{% if m.tool_calls %}")
    assert said([user(), answer(None, tool_calls=[call])], picky + PROMPT) == written
    with pytest.raises(DataError, match="message 2 of 2 is a tool call, and the chat template"):
        encode_chat([user(), answer(None, tool_calls=[call])], byte_tokenizer(CHAT))


def test_a_call_that_later_turns_render_otherwise_is_still_told_apart() -> None:
    """As Qwen3: thoughts in the last turn only, and a word between words and calls."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}"
        "<think></think>{% endif %}{{ m.content }}{% for c in m.tool_calls %}{% if m.content %}"
        " and {% endif %}[{{ c.function.name }}({{ c.function.arguments }})]{% endfor %}"
        "<end>{% endfor %}" + PROMPT
    )
    calls = [{"function": {"name": name, "arguments": "1"}} for name in "fg"]
    turns = [user(), answer(None, tool_calls=calls), {"role": "tool", "content": "2"}, answer()]
    assert said(turns, template) == "[f(1)][g(1)]<end>|<think></think>yo<end>|"


def test_a_turn_ends_with_whole_tokens() -> None:
    """As Phi-3: the end token follows the last turn only, and begins as the next role does."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = fast_tokenizer(template)
    found = encode_chat([user(), answer(), user(), answer("so")], tokenizer)
    assert learned_text(found, tokenizer) == "yo||so|<eos>|"


def test_nothing_is_not_written_as_python_writes_it() -> None:
    for template in (CHAT, CHAT.replace("m['content']", "m['content'] + ''")):
        tokenizer = byte_tokenizer(template)
        found = encode_chat([user(None), answer("None")], tokenizer)
        assert tokenizer.decode(found.ids) == "<user>\n<assistant>None\n"


def test_a_number_for_content_is_as_the_file_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": 2.50}]}\n'
        '{"conversations": [{"from": "human", "value": 7}, {"from": "gpt", "value": 1e5}]}\n'
    )
    tokenizer = byte_tokenizer(CHAT)
    for number, written in ((0, "2.50"), (1, "1e5")):
        chosen = "messages" if number == 0 else "sharegpt"
        row = load_rows(files_config(path, format=chosen))[number]
        found = encode(row, files_config(path, format=chosen), tokenizer)
        assert found is not None
        assert learned_text(found, tokenizer) == f"{written}\n|"


def load(path: Path, tokenizer: Any, **values: Any) -> list[Encoded]:
    config = files_config(path, context=1000, heldout=0.0, **values)
    return load_client_data(config, tokenizer, partition=0, partitions=1, seed=0).train


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_beside_the_messages_reach_the_template(tmp_path: Path, as_text: bool) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT
    tools = '[{"name": "f"}]'
    path = write_jsonl(
        tmp_path / "d.jsonl",
        [{"messages": [user(), answer()], "tools": tools if as_text else [{"name": "f"}]}],
    )
    tokenizer = byte_tokenizer(template)
    (found,) = load(path, tokenizer)
    assert tokenizer.decode(found.input_ids) == tools + "<user>hi\n<assistant>yo\n"
    write_jsonl(path, [{"messages": [user(), answer()], "tools": "[f"}])
    with pytest.raises(DataError, match=r"line 1\): column 'tools' is neither a list nor JSON"):
        load(path, tokenizer)


def test_what_a_template_leaves_out_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [user(), answer(reasoning_content="because")]
    row = {"messages": turns, "tools": [{"name": "f"}], "documents": [{"text": "d"}], "system": "s"}
    with caplog.at_level(logging.WARNING):
        load(write_jsonl(tmp_path / "d.jsonl", [row] * 3), byte_tokenizer(CHAT))
    for words in ("use tools", "use documents", "use reasoning_content", "column system"):
        assert caplog.text.count(words) == 1


def test_a_role_that_a_template_refuses_is_named_with_row_and_remedy(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + CHAT
    )
    rows = [[user(), answer()], [{"role": "system", "content": "s"}, user(), answer()]]
    path = write_jsonl(tmp_path / "d.jsonl", ({"messages": turns} for turns in rows))
    words = r"d\.jsonl, line 2\): .*\['system', 'user', 'assistant'\] \(change its turns, or give"
    with pytest.raises(DataError, match=words + r".*\): System role not supported$"):
        load(path, byte_tokenizer(template))


def test_other_names_of_the_assistant_are_told(tmp_path: Path) -> None:
    turns = [{"role": "human", "content": "x"}, {"role": "gpt", "content": "y"}]
    with pytest.raises(DataError, match="nobody .* role assistant, but there is gpt, human"):
        encode_chat(turns, byte_tokenizer(CHAT))
