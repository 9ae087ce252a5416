"""From messages to the tokens that an answer follows, by the chat template or as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]

_PROBE = "Qx7GraftProbe7xQ"


class Prompts:
    """How a tokenizer writes a conversation down."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.chats = bool(tokenizer.chat_template)
        """Whether there is a chat template; without one, a text is gone on with."""
        self._start = _start(tokenizer)

    def of(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation, up to where the answer begins."""
        if not messages:
            raise ValueError("no messages: an answer needs one message or more")
        for message in messages:
            _check(message)
        return self._chat(messages) if self.chats else self.text(plain(messages))

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text that is gone on with, begun as the tokenizer begins one."""
        ids = self._bare(text) if text else []
        if not self._start or ids[: len(self._start)] == self._start:
            return ids
        return [*self._start, *ids]

    def turn_ends(self) -> set[int]:
        """Return the special token that the chat template puts behind an answer."""
        if not self.chats:
            return set()
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        after = self._bare(self._rendered(asked, prompt=False).partition(_PROBE)[2])
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        return set(after[:1]) & special

    def _chat(self, messages: Messages) -> list[int]:
        return self._bare(self._rendered(messages, prompt=True))

    def _rendered(self, messages: Messages, *, prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"the chat template refuses a conversation of {roles}: {error}; change its turns "
                "(some templates take no system message, most want user and assistant in turn)"
            ) from error

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def plain(messages: Messages) -> str:
    """Return the messages as one text; what a user writes after an answer begins a line."""
    text = ""
    for message in messages:
        answered = message["role"] == "assistant"
        text += message["content"] if answered or not text or text.endswith("\n") else (
            "\n" + message["content"]
        )  # fmt: skip
    return text


def _check(message: Mapping[str, str]) -> None:
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise ValueError(
                f"a message needs {key!r} with text, as in "
                f'{{"role": "user", "content": "Hello"}}; this one has {sorted(message)}'
            )


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text by itself (a BOS, or nothing)."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((n for n in places if whole[n : n + len(bare)] == bare), 0)]
