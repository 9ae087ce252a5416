"""Public text, which tokens are rare, numbers or names, and how alike two texts are.

Shapes: T tokens, N tokens of several texts.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

RARE = 1e-3
"""A token with a smaller share of public text is rare."""
_NUMBER = re.compile(r"\d[\d .,:/-]*")
_NAME = re.compile(r"(?<=[a-z,;:'\"(] )[A-Z][A-Za-z'-]+(?: [A-Z][A-Za-z'-]+)*")
"""Capitals where no sentence begins."""


@lru_cache(maxsize=1)
def public_text(most: int = 400_000) -> str:
    """English that everybody has: what Python's own modules say of themselves.

    Parameters
    ----------
    most : int
        Characters.
    """
    found, size = [], 0
    for text in _docstrings():
        found.append(text)
        size += len(text)
        if size > most:
            break
    return "\n\n".join(found)


def _docstrings() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    yield text


def public_ids(
    tokenizer: PreTrainedTokenizerBase, context: int, most: int, vocabulary: int
) -> list[list[int]]:
    """Public text in pieces of `context` tokens, `most` of them."""
    # A few characters more than are needed: a token is seldom longer than six.
    text = public_text()[: 8 * context * most]
    ids = [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < vocabulary]
    pieces = [ids[start : start + context] for start in range(0, len(ids), context)]
    return [piece for piece in pieces if len(piece) == context][:most]


class Rarity:
    """How common tokens are, by public text.

    Parameters
    ----------
    public : sequence of sequences of int
        Ids.
    vocabulary : int
        How many ids there are.
    """

    def __init__(self, public: Sequence[Sequence[int]], vocabulary: int) -> None:
        ids = torch.tensor([i for text in public for i in text], dtype=torch.long)
        counts_V = torch.bincount(ids, minlength=vocabulary)[:vocabulary]
        self.share_V = counts_V / max(1, len(ids))
        self.commonest = int(counts_V.argmax())

    def rare(self, ids_T: Tensor) -> Tensor:
        """Which tokens are rare (T,)."""
        return self.share_V[ids_T] < RARE

    def chance(self, ids_N: Tensor) -> float:
        """Hits of the best constant guess: who sees nothing says one token everywhere."""
        return float(torch.bincount(ids_N).max()) / len(ids_N)


def classes_of(
    ids_T: Tensor, tokenizer: PreTrainedTokenizerBase, rarity: Rarity
) -> dict[str, Tensor]:
    """Which tokens of a text are of which kind: masks (T,) by name."""
    pieces = [tokenizer.decode([i]) for i in ids_T.tolist()]
    text = "".join(pieces)
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    spans = [(end - len(piece), end) for end, piece in zip(ends, pieces, strict=True)]
    return {
        "tokens": torch.ones(len(ids_T), dtype=torch.bool),
        "rare tokens": rarity.rare(ids_T),
        "numbers": _within(spans, _NUMBER, text),
        "names": _within(spans, _NAME, text),
    }


def _within(spans: Sequence[tuple[int, int]], pattern: re.Pattern[str], text: str) -> Tensor:
    """Which spans share a character with a match that is no space at its end."""
    kept = {
        at
        for match in pattern.finditer(text)
        for at in range(match.start(), match.start() + len(match.group().rstrip(" .,:/-")))
    }
    return torch.tensor([any(at in kept for at in range(*span)) for span in spans])


def rouge_l(guess: Sequence[int], target: Sequence[int]) -> float:
    """ROUGE-L (Lin 2004), F1 of the longest common subsequence, over tokens."""
    before = [0] * (len(target) + 1)
    for ours in guess:
        row = [0]
        for at, theirs in enumerate(target, 1):
            row.append(before[at - 1] + 1 if ours == theirs else max(before[at], row[-1]))
        before = row
    longest = before[-1]
    return 2 * longest / (len(guess) + len(target)) if longest else 0.0
