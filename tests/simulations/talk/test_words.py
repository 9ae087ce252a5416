"""Text comes in whole characters, and nothing of a stop string comes."""

from __future__ import annotations

import random

import pytest

from simulations.talk.words import BROKEN, Stops, Words
from tests.simulations.talk.helpers import byte_level, bytes_tokenizer, sentencepiece

TEXT = "Grüße 🧑‍🚀 ok 你好, naïve"


@pytest.mark.parametrize("make", [bytes_tokenizer, byte_level, sentencepiece])
def test_characters_come_whole_though_tokens_split_them(make) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(TEXT)  # more bytes than characters
    words = Words(tokenizer)

    pieces = [words.add([token]) for token in ids]

    assert "".join(pieces) + words.rest() == TEXT
    assert not any(BROKEN in piece for piece in pieces)
    assert "🧑" in pieces  # as soon as it is whole
    assert pieces[0] == ("G" if make is not sentencepiece else "")


def test_spaces_before_words_are_kept_and_the_prompt_counts() -> None:
    tokenizer = sentencepiece()
    one, two, three = (tokenizer.convert_tokens_to_ids(t) for t in ("▁one", "▁two", "three"))
    after_text, alone = Words(tokenizer, [two]), Words(tokenizer)
    assert [after_text.add([t]) for t in (one, two, three)] == [" one", " two", "three"]
    assert [alone.add([t]) for t in (one, two, three)] == ["one", " two", "three"]


def test_half_a_character_comes_at_the_end_only() -> None:
    tokenizer = byte_level()
    half = tokenizer("你", add_special_tokens=False)["input_ids"][:2]
    words = Words(tokenizer)
    assert words.add(half) == ""
    assert words.rest() == BROKEN


@pytest.mark.parametrize("make", [bytes_tokenizer, byte_level])
def test_arbitrary_bytes_come_as_the_tokenizer_decodes_them(make) -> None:
    tokenizer, chance = make(), random.Random(0)
    for _ in range(50):
        ids = [chance.randrange(3, 256) for _ in range(30)]
        words = Words(tokenizer)
        told = "".join(words.add([token]) for token in ids) + words.rest()
        assert told == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_stop_string_is_found_across_pieces_and_cut_off() -> None:
    stops = Stops(["END", "\n\nQ"])
    assert [stops.add(piece) for piece in ("one E", "N", "Z E", "ND two")] == [
        "one ", "", "ENZ ", "",
    ]  # fmt: skip
    assert stops.found
    assert stops.add("more") == stops.rest() == ""


def test_the_first_of_two_stop_strings_counts() -> None:
    stops = Stops(["yes", "no"])
    assert stops.add("a no and a yes") == "a "


def test_what_only_looked_like_a_stop_string_is_told_at_the_end() -> None:
    stops = Stops(["aab"])
    assert stops.add("xaa") == "x"
    assert stops.add("a") == "a"  # still two that may begin it
    assert stops.rest() == "aa"
    assert not stops.found
