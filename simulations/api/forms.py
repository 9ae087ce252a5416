"""answers as OpenAI writes them: chat and text completions, whole and in chunks"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from simulations.api.answers import Delta
from simulations.api.jobs import Job
from simulations.api.scores import Scored
from simulations.api.tokens import offsets, shown, token_bytes


class Form(Protocol):
    """How an endpoint writes its answers."""

    def begin(self) -> Iterator[dict[str, Any]]:
        """Give the chunks that come before any text."""
        ...

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Give a chunk of a stream."""
        ...

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Give the whole answer at once."""
        ...

    def last(self) -> dict[str, Any]:
        """Give the chunk with the usage."""
        ...


@dataclass(kw_only=True)
class _Form:
    tokenizer: PreTrainedTokenizerBase
    job: Job
    fingerprint: str
    prefix: str
    kind: str
    identity: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    generated: int = 0

    def __post_init__(self) -> None:
        self.identity = f"{self.prefix}-{secrets.token_hex(12)}"

    def head(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return what every answer and chunk has."""
        return {
            "id": self.identity,
            "object": kind,
            "created": self.created,
            "model": self.job.wanted.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }

    def usage(self) -> dict[str, int]:
        """Return the tokens so far."""
        prompt, new = self.job.prompt_tokens, self.generated
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def chunked(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        """Return a chunk; with `include_usage` all but the last have an empty one."""
        return self.head(kind, [choice], **({"usage": None} if self._includes else {}))

    @property
    def _includes(self) -> bool:
        return self.job.wanted.include_usage

    def last(self) -> dict[str, Any]:
        """Return the chunk with the usage, which has no choices."""
        return self.head(self.kind, [], usage=self.usage())

    def shown(self, token: int) -> str:
        """Return a token as text."""
        return shown(token_bytes(self.tokenizer, token))


class ChatForm(_Form):
    """How /v1/chat/completions answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, job: Job, fingerprint: str) -> None:
        super().__init__(
            tokenizer=tokenizer, job=job, fingerprint=fingerprint,
            prefix="chatcmpl", kind="chat.completion.chunk",
        )  # fmt: skip

    def begin(self) -> Iterator[dict[str, Any]]:
        """Give each choice's role."""
        for index in range(self.job.wanted.n):
            delta = {"role": "assistant", "content": "", "refusal": None}
            yield self.chunked(self.kind, _choice(index, "", delta=delta, logprobs=None))

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Give a chunk of a stream."""
        self.generated += delta.generated
        said = {"content": delta.text} if delta.text or not delta.finish else {}
        choice = _choice(
            delta.index, delta.finish, delta=said, logprobs=self._logprobs(delta.tokens)
        )
        return self.chunked(self.kind, choice)

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Give the whole answer at once."""
        choices = []
        for index, text, tokens, finish in _gathered(deltas):
            message = {"role": "assistant", "content": text, "refusal": None}
            logprobs = self._logprobs(tokens)
            choices.append(_choice(index, finish, message=message, logprobs=logprobs))
        self.generated = sum(delta.generated for delta in deltas)
        return self.head("chat.completion", choices, usage=self.usage())

    def _logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        if self.job.wanted.top_logprobs is None:
            return None
        special = self.tokenizer.all_special_ids  # what ends an answer is no part of its text
        said = [self._judged(one) for one in tokens if one.token not in special]
        return {"content": said, "refusal": None}

    def _judged(self, one: Scored) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        spelled = token_bytes(self.tokenizer, token)
        return {"token": shown(spelled), "logprob": logprob, "bytes": list(spelled)}


class CompletionForm(_Form):
    """How /v1/completions answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, job: Job, fingerprint: str) -> None:
        super().__init__(
            tokenizer=tokenizer, job=job, fingerprint=fingerprint,
            prefix="cmpl", kind="text_completion",
        )  # fmt: skip
        self._told: dict[int, int] = {}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Give nothing: a text has no role."""
        return iter(())

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """Give a chunk of a stream."""
        self.generated += delta.generated
        start = self._told.get(delta.index, 0)
        self._told[delta.index] = start + len(delta.text)
        logprobs = self._logprobs(delta.tokens, start)
        choice = _choice(delta.index, delta.finish, text=delta.text, logprobs=logprobs)
        return self.chunked(self.kind, choice)

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Give the whole answer at once."""
        choices = [
            _choice(index, finish, text=text, logprobs=self._logprobs(tokens, 0))
            for index, text, tokens, finish in _gathered(deltas)
        ]
        self.generated = sum(delta.generated for delta in deltas)
        return self.head(self.kind, choices, usage=self.usage())

    def _logprobs(self, tokens: Sequence[Scored], start: int) -> dict[str, Any] | None:
        if self.job.wanted.top_logprobs is None:
            return None
        spelled = [token_bytes(self.tokenizer, one.token) for one in tokens]
        return {
            "tokens": [shown(one) for one in spelled],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [self._top(one) for one in tokens],
            "text_offset": offsets(spelled, start),
        }

    def _top(self, one: Scored) -> dict[str, float] | None:
        """Return the likeliest tokens and the chosen one: the first token of all has none."""
        if one.logprob is None:
            return None
        best: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            best.setdefault(self.shown(token), logprob)
        return best


def _choice(index: int, finish: str, **what: Any) -> dict[str, Any]:
    return {"index": index, **what, "finish_reason": finish or None}


def _gathered(deltas: Iterable[Delta]) -> Iterator[tuple[int, str, list[Scored], str]]:
    """Put together what belongs to one choice."""
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    for index, own in sorted(by_index.items()):
        text = "".join(delta.text for delta in own)
        yield index, text, [token for delta in own for token in delta.tokens], own[-1].finish
