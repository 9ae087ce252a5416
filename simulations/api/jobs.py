"""from a request to what is to be computed: prompts as tokens, checked against the model"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulations.api.chat import Chat
from simulations.api.completion import Completion
from simulations.api.errors import ApiError, too_long, unknown_model, wrong
from simulations.api.wanted import Wanted
from simulations.talk.speaker import Speaker


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, and how many tokens may follow it."""

    ids: tuple[int, ...]
    text: str
    """What `echo` gives back; empty without it."""
    room: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be computed for one request."""

    prompts: tuple[Prompt, ...]
    wanted: Wanted
    echo: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once, as OpenAI does."""
        return sum(len(prompt.ids) for prompt in self.prompts)


UNBOUNDED = 4096
"""New tokens at most, where neither the request nor the model sets a limit."""


def job_of_chat(speaker: Speaker, chat: Chat) -> Job:
    """Return what a chat completion takes, or say why it cannot be."""
    _check(speaker, chat)
    try:
        ids = speaker.prompt(chat.messages)
    except ValueError as error:
        raise wrong("messages", str(error)) from error
    if not ids:
        raise wrong("messages", "hold no text, and the model has no token to begin with")
    return Job(prompts=(_prompt(speaker, ids, chat, "messages"),), wanted=chat)


def job_of_completion(speaker: Speaker, completion: Completion) -> Job:
    """Return what completions take, or say why they cannot be."""
    _check(speaker, completion)
    prompts = []
    for given in completion.prompts:
        ids = speaker.prompts.text(given) if isinstance(given, str) else list(given)
        _known(speaker, ids, "prompt")
        prompt = _prompt(speaker, ids or _nothing(speaker), completion, "prompt")
        if completion.echo:
            text = given if isinstance(given, str) else speaker.tokenizer.decode(ids)
            prompt = Prompt(ids=prompt.ids, text=str(text), room=prompt.room)
        prompts.append(prompt)
    return Job(prompts=tuple(prompts), wanted=completion, echo=completion.echo)


def _check(speaker: Speaker, wanted: Wanted) -> None:
    if wanted.model != speaker.name:
        raise unknown_model(wanted.model, (speaker.name,))
    _known(speaker, list(wanted.logit_bias), "logit_bias")


def _known(speaker: Speaker, ids: Sequence[int], param: str) -> None:
    size = speaker.model.config.get_text_config(decoder=True).vocab_size
    strange = next((token for token in ids if not 0 <= token < size), None)
    if strange is not None:
        raise wrong(param, f"token {strange} is not one of the model's {size}: 0 to {size - 1}")


def _nothing(speaker: Speaker) -> list[int]:
    """Return what stands before any text: OpenAI's completion of no prompt begins there."""
    tokenizer = speaker.tokenizer
    start = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None
    )
    if start is None:
        raise wrong("prompt", "is empty, and the model has no token that begins a text")
    return [start]


def _prompt(speaker: Speaker, ids: Sequence[int], wanted: Wanted, param: str) -> Prompt:
    context, new = speaker.context, wanted.max_tokens
    if context is None:
        room = UNBOUNDED if new is None else new
    else:
        room = max(context - len(ids), 1) if new is None else new
        if len(ids) + room > context:
            raise too_long(len(ids), room, context, param)
    return Prompt(ids=tuple(ids), text="", room=room)


def check_count(tokens: object) -> list[int]:
    """Return token ids that a client sent, or refuse them."""
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ApiError(
            "tokens: is to be an array of token ids", param="tokens", code="invalid_type"
        )
    return tokens
