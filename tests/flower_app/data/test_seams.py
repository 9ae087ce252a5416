"""Special tokens at the seams: one start, one end, and prompts as generation meets them."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flower_app.data.text import Encoded, encode_prompt, encode_text
from tests.flower_app.data.helpers import byte_tokenizer

CORPUS = [
    "the cat sat on the mat. the user asked, and it answered: yes!",
    "Question: what is 2+2? Answer: 4. Hello world, hello there.",
    "größer als die Welt 世界, and so on\n\nand so forth",
] * 3
LETTERS = "the cat sHiQ:.!\n 42?ö世wold"


def _ends(start: str, end: str, inner: Tokenizer) -> processors.TemplateProcessing:
    names = [name for name in (start, end) if name]
    return processors.TemplateProcessing(
        single=f"{start} $A {end}".strip(),
        pair=f"{start} $A $B {end}".strip(),
        special_tokens=[(name, inner.token_to_id(name)) for name in names],
    )


def _byte_level(*, prefix: bool, start: str, end: str) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(CORPUS, trainer)
    if start or end:
        inner.post_processor = _ends(start, end, inner)
    return inner


def _sentencepiece(*, scheme: str, start: str, end: str) -> Tokenizer:
    """Like Llama 2's: a metaspace before the text, bytes for what the vocabulary lacks."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    if start or end:
        inner.post_processor = _ends(start, end, inner)
    return inner


def _word_piece(*, start: str, end: str) -> Tokenizer:
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", start, end], show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = _ends(start, end, inner)
    return inner


MAKERS = {
    "byte-level": lambda: _byte_level(prefix=False, start="", end=""),
    "byte-level, own start": lambda: _byte_level(prefix=False, start="<s>", end=""),
    "byte-level, prefix space, own ends": lambda: _byte_level(prefix=True, start="<s>", end="</s>"),
    "sentencepiece": lambda: _sentencepiece(scheme="always", start="", end=""),
    "sentencepiece, own start": lambda: _sentencepiece(scheme="always", start="<s>", end=""),
    "sentencepiece, first only": lambda: _sentencepiece(scheme="first", start="<s>", end=""),
    "sentencepiece, own end": lambda: _sentencepiece(scheme="always", start="", end="</s>"),
}


@lru_cache
def made(kind: str) -> PreTrainedTokenizerBase:
    if kind == "bytes":
        return byte_tokenizer()
    if kind == "word piece":
        inner = _word_piece(start="[CLS]", end="[SEP]")
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=MAKERS[kind](), bos_token="<s>", eos_token="</s>"
    )


KINDS = [*MAKERS, "bytes"]


def plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def met(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What generation starts from: the tokenizer's ids without an end of its own."""
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def spelled(found: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the ids, without the start that the tokenizer gave it and the end."""
    start = met("", tokenizer)
    ids = found.ids[:-1] if found.ids[-1] == tokenizer.eos_token_id else found.ids
    return decoded(ids[len(start) :], tokenizer)


texts = st.text(alphabet=LETTERS, min_size=1, max_size=14)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=texts, completion=texts)
@example(prompt="Hello wor", completion="ld")
@example(prompt="Answer:", completion="4")
@example(prompt="Answer: ", completion="yes")
@example(prompt="the c", completion="at sat")
@example(prompt="x\n", completion="\nö")
def test_prompt_and_completion_are_joined_as_they_are(
    kind: str, prompt: str, completion: str
) -> None:
    tokenizer = made(kind)
    found = encode_prompt(prompt, completion, tokenizer)
    begin = met(prompt, tokenizer)

    assert found.ids[: len(begin)] == begin
    assert found.learned == [False] * len(begin) + [True] * (len(found.ids) - len(begin))
    assert spelled(found, tokenizer) == decoded(plain(prompt + completion, tokenizer), tokenizer)
    assert found.ids[-1] == tokenizer.eos_token_id
    assert found.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bytes"])
def test_an_end_that_the_user_wrote_stays_and_is_not_doubled(kind: str) -> None:
    tokenizer = made(kind)
    end = tokenizer.eos_token_id
    for prompt, completion, ends in (
        ("Hi</s>", "the cat", 2), ("Hi</s>", "the cat</s>", 2), ("Hi", "the cat</s>", 1),
        ("Hi</s>", "the</s>cat", 3), ("</s>", "the", 2),
    ):  # fmt: skip
        found = encode_prompt(prompt, completion, tokenizer)
        begin = [*met("", tokenizer), *plain(prompt, tokenizer)]
        assert found.ids[: len(begin)] == begin
        assert found.ids.count(end) == ends
        assert found.ids[-1] == end
        assert found.learned[-1]
    for text, ends in (("the cat", 1), ("the cat</s>", 1), ("the</s>cat", 2)):
        found = encode_text(text, tokenizer)
        assert found.ids.count(end) == ends
        assert found.ids[-1] == end


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "bytes"])
def test_a_text_that_begins_with_the_start_token_does_not_get_another(kind: str) -> None:
    tokenizer = made(kind)
    start = tokenizer.bos_token_id
    for found in (
        encode_text("<s>the cat", tokenizer),
        encode_prompt("<s>the", " cat", tokenizer),
        encode_prompt("", "<s>the cat", tokenizer),
    ):
        assert found.ids.count(start) == 1
        assert found.ids[0] == start


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_as_the_tokenizer_begins_it(kind: str) -> None:
    tokenizer = made(kind)
    for text in ("the cat", " the", "\n"):
        assert encode_text(text, tokenizer).ids == [*met(text, tokenizer), tokenizer.eos_token_id]
        found = encode_prompt("", text, tokenizer)
        assert found.ids == [*met(text, tokenizer), tokenizer.eos_token_id]
        assert found.learned.index(True) == len(met("", tokenizer))


def test_a_tokenizer_without_an_end_token_ends_a_text_as_it_does() -> None:
    tokenizer = made("word piece")
    begin, end = plain("[CLS]", tokenizer), plain("[SEP]", tokenizer)
    assert encode_text("the cat", tokenizer).ids == begin + plain("the cat", tokenizer) + end

    found = encode_prompt("the cat", " sat", tokenizer)
    assert found.ids == begin + plain("the cat sat", tokenizer) + end
    assert found.learned == [False] * 3 + [True] * (len(found.ids) - 3)


def test_words_that_a_tokenizer_joins_over_the_border_spell_the_joined_text() -> None:
    tokenizer = made("word piece")
    for prompt, completion in (("the c", "at sat"), ("hel", "lo"), ("an", "d")):
        found = encode_prompt(prompt, completion, tokenizer)
        assert decoded(found.ids[1:-1], tokenizer) == prompt + completion
        assert found.learned[-2:] == [True, True]
