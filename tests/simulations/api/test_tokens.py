"""Tokens as bytes: half characters too, whatever the tokenizer."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from simulations.api.tokens import offsets, shown, token_bytes

TEXT = "Ein Maß für «déjà vu» 🙂"


def test_bytes_put_together_are_the_text_again() -> None:
    bytewise = ByT5Tokenizer(extra_ids=0)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=280, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    for tokenizer in (bytewise, PreTrainedTokenizerFast(tokenizer_object=core)):
        ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == TEXT


def test_half_a_character_is_shown_as_its_bytes() -> None:
    assert shown("ß".encode()) == "ß"
    assert shown("ß".encode()[:1]) == "bytes:\\xc3"


def test_offsets_are_in_characters() -> None:
    assert offsets([b"a", b"\xc3", b"\x9f", b"bc", b"d"]) == [0, 1, 1, 2, 4]
    assert offsets([b"a", b"b"], start=7) == [7, 8]
