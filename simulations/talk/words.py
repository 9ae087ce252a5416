"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What a decoder puts in place of bytes that are no character; at the end: not one yet."""
CONTEXT = 6
"""Tokens of the prompt that are decoded along: the space before the first word depends on them."""


class Words:
    """The text of tokens that come one by one.

    A window of the last tokens is decoded each time, from a border where the text was whole: what
    is new in it is the text. So a token's text may depend on the one before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-CONTEXT:])
        self._border = len(self._window)
        self._told = len(self._decode(self._window))

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that is whole with these tokens."""
        self._window.extend(ids)
        text = self._decode(self._window)
        whole = text.rstrip(BROKEN)
        new = whole[self._told :]
        self._told = max(self._told, len(whole))
        if new and whole == text:
            self._window = self._window[self._border :]
            self._border = len(self._window)
            self._told = len(self._decode(self._window))
        return new

    def rest(self) -> str:
        """Return what was held back, once no token follows."""
        text = self._decode(self._window)
        new, self._told = text[self._told :], len(text)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


class Stops:
    """Cuts text at the first of several strings, though it comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Return the text of which it is certain that no stop string begins in it."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return what was held back, once no text follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
