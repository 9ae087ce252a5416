"""Encoded documents, and the examples of at most `data.context` tokens that are cut from them.

Labels stand at the position of their own token (the loss shifts them); -100 does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conf.schema import DataConfig
from flower_app.data.refusals import DataError

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence of T tokens, with T >= 2 and at least one label that counts after the shift."""

    input_ids: torch.Tensor
    """(T,) int64."""
    labels: torch.Tensor
    """(T,) int64: the token's own id, or -100 where it is not learned. Not shifted."""


@dataclass(frozen=True)
class Encoded:
    """The token ids of one document and which of them are learned."""

    ids: list[int]
    learned: list[bool]
    whole: bool
    """A prompt or a chat is one example; only plain text may be cut into several."""
    notes: frozenset[str] = frozenset()
    """What the log should say of it: parts of a conversation that its template leaves out."""


def cut(encoded: Encoded, config: DataConfig, where: str) -> list[Example]:
    """Return the examples of at most `config.context` tokens of one document.

    Windows follow one another without overlap. Those in which nothing is learned (one token, or
    only prompt tokens) are left out, so the list may be empty.

    Raises
    ------
    DataError
        If the document is longer than the context and `config.overlong` is `refuse`.
    """
    size = config.context
    if len(encoded.ids) > size and config.overlong == "refuse":
        raise DataError(
            f"{where} has {len(encoded.ids)} tokens, more than data.context={size}, and "
            "data.overlong=refuse: raise the context, or let texts be cut with "
            "data.overlong=chunk or truncate"
        )
    one = encoded.whole or config.overlong == "truncate"
    starts = [0] if one else range(0, len(encoded.ids), size)
    windows = [
        (encoded.ids[start : start + size], encoded.learned[start : start + size])
        for start in starts
    ]
    return [_example(ids, learned) for ids, learned in windows if any(learned[1:])]


def _example(ids: list[int], learned: list[bool]) -> Example:
    input_ids = torch.tensor(ids, dtype=torch.int64)
    labels = input_ids.masked_fill(~torch.tensor(learned), IGNORED)
    return Example(input_ids, labels)
