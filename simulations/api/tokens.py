"""what a token is as bytes and as text, whatever the tokenizer; and where it stands in a text"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from functools import cache, lru_cache

from transformers import ByT5Tokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

RAW_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@lru_cache(maxsize=1_000_000)
def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """Return what a token stands for. One character of text may take several tokens."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None or token in tokenizer.all_special_ids:
        return (piece or "").encode()
    if isinstance(tokenizer, ByT5Tokenizer):
        return piece.encode("latin-1") if len(piece) == 1 else piece.encode()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if "ByteLevel" in str(getattr(backend, "decoder", "")):
        return b"".join(_of_byte_level(character) for character in piece)
    if raw := RAW_BYTE.fullmatch(piece):
        return bytes([int(raw[1], 16)])
    if "\u2581" in piece:  # SentencePiece's mark for a space
        return piece.replace("\u2581", " ").encode()
    return str(tokenizer.convert_tokens_to_string([piece])).encode()


@cache
def _bytes_of_characters() -> dict[str, bytes]:
    return {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}


def _of_byte_level(character: str) -> bytes:
    return _bytes_of_characters().get(character, character.encode())


def shown(spelled: bytes) -> str:
    r"""Return a token as text; part of a character as OpenAI writes it: bytes:\xe2\x82."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def offsets(spelled: Iterable[bytes], start: int = 0) -> list[int]:
    """Return where in the text each token begins, in characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = []
    for one in spelled:
        found.append(start)
        start += len(decoder.decode(one))
    return found
