"""What stays between two answers: the cache and the tokens that are in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import Cache
from transformers.cache_utils import (
    BaseQuantizedLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

_OTHERS = (LinearAttentionCacheLayerMixin, BaseQuantizedLayer)
"""Layers of a state that sums up what was, or that only comes close to it."""


class Conversation:
    """The cache of one conversation. It holds one answer at a time.

    What a new prompt shares with the cached tokens is not computed again: the cache is set back to
    the common prefix. One that cannot be set back exactly (a sliding window that has moved on,
    linear attention) is dropped, and the prompt is computed whole.
    """

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self._ids: list[int] = []
        self._busy = threading.Lock()

    @property
    def length(self) -> int:
        """Tokens that are cached."""
        return len(self._ids)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Keep others out while an answer is made."""
        if not self._busy.acquire(blocking=False):
            raise ValueError(
                "this conversation is being answered: let the answer end, cancel it, or ask in a "
                "conversation of its own"
            )
        try:
            yield
        finally:
            self._busy.release()

    def take(self, ids: Sequence[int]) -> tuple[Cache | None, int]:
        """Hand out the cache, set back to what it shares with `ids`, and how much that is.

        It comes back with `keep`. At least one token of `ids` is left to be computed.
        """
        cache, have = self._cache, self._ids
        self.drop()
        shared = min(_shared(have, ids), len(ids) - 1)
        if cache is None or shared <= 0 or not set_back(cache, len(have) - shared):
            return None, 0
        return cache, shared

    def keep(self, cache: Any, ids: Sequence[int]) -> None:
        """Hold what an answer leaves: the cache, and all tokens of prompt and answer.

        The last token has been drawn but not computed: as many are in the cache as it says.
        """
        if isinstance(cache, Cache) and _plain(cache) and cache.get_seq_length() <= len(ids):
            self._cache, self._ids = cache, list(ids[: cache.get_seq_length()])

    def drop(self) -> None:
        """Forget what is cached; the next prompt is computed whole."""
        self._cache, self._ids = None, []


def set_back(cache: Cache, count: int) -> bool:
    """Take the last `count` tokens out of a cache; False if that cannot be done exactly."""
    if not count:
        return True
    if any(_moved_on(layer) for layer in cache.layers):
        return False
    before = cache.get_seq_length()
    cache.crop(-count)
    return cache.get_seq_length() == before - count


def _plain(cache: Cache) -> bool:
    """Whether all layers keep keys and values, so that a text can go on after them."""
    return all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, _OTHERS) for layer in cache.layers
    )


def _moved_on(layer: Any) -> bool:
    """Whether a sliding window has let go of tokens that would be needed again."""
    window = getattr(layer, "sliding_window", None)
    return window is not None and layer.get_seq_length() >= window


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((place for place, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
