"""Texts become ids and labels: masks are exact; what cannot be learned is left out or refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from conf.schema import DataConfig, ModelConfig
from flower_app.data.text import IGNORED, Encoded, cut, encode, encode_chat, load_tokenizer
from tests.flower_app.data.helpers import (
    CHAT,
    MARKED_CHAT,
    byte_tokenizer,
    fast_tokenizer,
    is_masked,
    learned_text,
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie heißt du?"},
    {"role": "assistant", "content": "Ich heiße Graft 🌱."},
    {"role": "user", "content": "Ok"},
    {"role": "assistant", "content": "Bye"},
]
PLAIN = DataConfig()
PROMPTS = DataConfig(prompt_column="q", completion_column="a")
CHATS = DataConfig(messages_column="m")


def encoded(row: dict[str, Any], config: DataConfig, tokenizer: Any) -> Encoded:
    found = encode(row, config, tokenizer)
    assert found is not None
    assert len(found.ids) == len(found.learned)
    return found


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界 🌍\n", "</s> <pad> is text", " a\t\x00"])
def test_bytes_round_trip_any_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    found = encoded({"text": text + "."}, PLAIN, tokenizer)
    assert len(tokenizer) == 259
    assert found.ids == [byte + 3 for byte in (text + ".").encode()] + [tokenizer.eos_token_id]
    assert all(found.learned)
    assert tokenizer.decode(found.ids, skip_special_tokens=True) == text + "."


def test_text_ends_with_the_end_token_once() -> None:
    for tokenizer in (byte_tokenizer(), fast_tokenizer()):
        ids = encoded({"text": "ab"}, PLAIN, tokenizer).ids
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), fast_tokenizer()])
def test_only_the_completion_is_learned(tokenizer: Any) -> None:
    found = encoded({"q": "Größe? ", "a": "groß"}, PROMPTS, tokenizer)
    prompt, completion = len("Größe? ".encode()), len("groß".encode())
    assert found.learned == [False] * prompt + [True] * (completion + 1)
    assert found.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(found.ids[:-1]) == "Größe? groß"
    (example,) = cut(found, PROMPTS, "row")
    assert example.labels.tolist() == [IGNORED] * prompt + example.input_ids[prompt:].tolist()


def test_an_empty_prompt_leaves_the_completion() -> None:
    found = encoded({"q": "", "a": "ab"}, PROMPTS, byte_tokenizer())
    assert found.learned == [True, True, True]


@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(CHAT), byte_tokenizer(CHAT + "{# generation %} #}"), fast_tokenizer(CHAT)],
)
def test_only_assistant_turns_are_learned(tokenizer: Any) -> None:
    found = encoded({"m": TALK}, CHATS, tokenizer)
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(found.ids) == rendered
    assert learned_text(found, tokenizer) == "Ich heiße Graft 🌱.\n|Bye\n|"


def test_a_marked_template_decides_what_is_learned() -> None:
    tokenizer = fast_tokenizer(MARKED_CHAT)
    found = encoded({"m": TALK}, CHATS, tokenizer)
    assert learned_text(found, tokenizer) == "Ich heiße Graft 🌱.\n|Bye\n|"
    assert found.ids == encoded({"m": TALK}, CHATS, fast_tokenizer(CHAT)).ids


def test_absent_keys_that_arrow_filled_do_not_reach_the_template() -> None:
    template = "{% for m in messages %}{% if m.tool is defined %}T{% endif %}{{ m.content }}"
    tokenizer = byte_tokenizer(template + "{% endfor %}")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool": None}]
    assert learned_text(encode_chat(turns, tokenizer), tokenizer) == "y|"


def test_chat_that_cannot_be_rendered_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="tokenizer with a chat template"):
        encode_chat(TALK, byte_tokenizer())
    with pytest.raises(ValueError, match="must be a list of"):
        encode_chat("hello", byte_tokenizer(CHAT))
    strict = byte_tokenizer("{{ raise_exception('only one turn') }}")
    with pytest.raises(ValueError, match=r"roles \['system', 'user'.*only one turn"):
        encode_chat(TALK, strict)
    forgetful = byte_tokenizer("{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_chat(TALK, forgetful)


@pytest.mark.parametrize(
    ("config", "row"),
    [
        (PLAIN, {"text": ""}),
        (PLAIN, {"text": " \n\t"}),
        (PLAIN, {"text": None}),
        (PROMPTS, {"q": "why", "a": ""}),
        (PROMPTS, {"q": None, "a": None}),
        (CHATS, {"m": []}),
        (CHATS, {"m": None}),
    ],
)
def test_a_row_without_text_is_none(config: DataConfig, row: dict[str, Any]) -> None:
    assert encode(row, config, byte_tokenizer(CHAT)) is None


def test_numbers_are_text_and_lists_are_not() -> None:
    tokenizer = byte_tokenizer()
    assert encoded({"q": "6*7=", "a": 42}, PROMPTS, tokenizer).learned[-3:] == [True] * 3
    with pytest.raises(ValueError, match="column 'text' must hold text, got list"):
        encode({"text": ["a"]}, PLAIN, tokenizer)


def whole(length: int, *, prompt: int = 0, one: bool = False) -> Encoded:
    return Encoded(list(range(length)), [i >= prompt for i in range(length)], whole=one)


def test_chunks_follow_one_another_and_lose_nothing_but_a_single_token() -> None:
    windows = cut(whole(10), DataConfig(context=4), "row")
    assert [w.input_ids.tolist() for w in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [w.labels.tolist() for w in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(cut(whole(9), DataConfig(context=4), "row")) == 2
    assert cut(whole(1), DataConfig(context=4), "row") == []


def test_truncate_keeps_the_beginning() -> None:
    (window,) = cut(whole(10), DataConfig(context=4, overlong="truncate"), "row")
    assert window.input_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("one", [False, True])
def test_refuse_names_the_document_and_its_length(one: bool) -> None:
    config = DataConfig(context=4, overlong="refuse")
    assert len(cut(whole(4, one=one), config, "row")) == 1
    with pytest.raises(ValueError, match=r"row 7 has 5 tokens, more than data\.context=4"):
        cut(whole(5, one=one), config, "row 7")


def test_a_prompt_is_never_chunked_and_needs_a_learned_token() -> None:
    config = DataConfig(context=4)
    (window,) = cut(whole(10, prompt=3, one=True), config, "row")
    assert is_masked(window.labels.tolist()) == [True, True, True, False]
    assert cut(whole(10, prompt=4, one=True), config, "row") == []
    # The first label of a sequence has nothing before it to be predicted from.
    assert cut(Encoded([1, 2], [True, False], whole=True), config, "row") == []


def test_a_tokenizer_folder_is_loaded_and_padded_with_its_end_token(tmp_path: Path) -> None:
    fast_tokenizer().save_pretrained(tmp_path)
    for model in (ModelConfig(path=str(tmp_path)), ModelConfig(path="x", tokenizer=str(tmp_path))):
        tokenizer = load_tokenizer(model)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        assert len(tokenizer) == len(fast_tokenizer())


def test_a_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    again = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert again("</s> é")["input_ids"] == byte_tokenizer()("</s> é")["input_ids"]


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        ModelConfig(path="last:demo"),
        ModelConfig(path="/no/such/folder"),
        ModelConfig(tokenizer="/no/such/file.gguf"),
    ],
)
def test_a_missing_tokenizer_is_refused_with_the_remedy(model: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"set model\.tokenizer to"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nope/model", "no folder /nope/model;"),
        ("~/nope/model", f"no folder {Path.home()}/nope/model;"),
        ("./nope/model", f"no folder {Path.cwd()}/nope/model;"),
        ("/nope/model.gguf", "no file /nope/model.gguf;"),
    ],
)
def test_a_missing_folder_is_not_taken_for_a_hub_id(name: str, words: str) -> None:
    for model in (ModelConfig(path=name), ModelConfig(path="x", tokenizer=name)):
        with pytest.raises(ValueError, match=re.escape(words)):
            load_tokenizer(model)
