"""Tiny models and tokenizers that talk."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from models.tiny import byte_llama, roughen, tiny_config
from simulations.talk.speaker import Conversation, Piece, Sampling, Speaker

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bytes_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0, split_special_tokens=True)


def tiny(context: int = 128) -> PreTrainedModel:
    """Return a byte model of random weights; it never draws the end token by itself."""
    config = byte_llama(32, 2, context)
    kind = config.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    model.generation_config.eos_token_id = None
    return roughen(model).eval()


def family(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(kind, vocab_size=259, eos_token_id=None, bos_token_id=None, **changes)
    return roughen(AutoModelForCausalLM.from_config(config)).eval()


def speaker(model: PreTrainedModel | None = None) -> Speaker:
    return Speaker(model or tiny(), bytes_tokenizer(), "tiny")


def spoken(
    speaker: Speaker,
    ids: list[int],
    conversation: Conversation | None = None,
    **sampling: Any,
) -> tuple[list[int], list[Piece]]:
    """Return the tokens of an answer, greedy if nothing else is asked for, and its pieces."""
    settings = Sampling(**{"temperature": 0.0, "max_tokens": 12, **sampling})
    pieces = list(speaker.stream(ids, settings, conversation=conversation))
    return [token for piece in pieces for token in piece.ids], pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def byte_level(template: str = "") -> PreTrainedTokenizerBase:
    """A byte-level BPE without merges: one token a byte, as GPT-2 and Qwen write bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    if template:
        fast.chat_template = template
    return fast


def sentencepiece() -> PreTrainedTokenizerBase:
    """A vocabulary as Llama 2 has it: words that begin with a space, and bytes to fall back on."""
    words = ["<unk>", "▁", "▁one", "▁two", "three", "a"]
    pieces = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
