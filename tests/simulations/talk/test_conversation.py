"""What is kept between answers changes no token, whatever was edited in between."""

from __future__ import annotations

import threading

import pytest

from simulations.talk.speaker import Conversation, Sampling
from tests.simulations.talk.helpers import family, speaker, spoken

pytestmark = pytest.mark.usefixtures("one_thread")

A, B = list(range(10, 30)), list(range(60, 75))


def test_a_longer_prompt_computes_what_is_new_only() -> None:
    talker, conversation = speaker(), Conversation()
    first, _ = spoken(talker, A, conversation)
    seen: list[int] = []
    talker.model.register_forward_pre_hook(
        lambda _m, _args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    ids, pieces = spoken(talker, [*A, *first, *B], conversation)
    assert seen[0] == len(B) + 1  # and the last token of the answer, which was only drawn
    assert pieces[-1].figures.reused == len(A) + len(first) - 1
    assert ids == spoken(talker, [*A, *first, *B])[0]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next"])
def test_answers_are_those_without_a_cache(kind: str) -> None:
    """Windows of 4 tokens, linear attention: what cannot be set back is computed anew."""
    talker, conversation = speaker(family(kind)), Conversation()
    edited = [*A[:7], 99, *A[8:]]
    first = spoken(talker, A, conversation)[0]
    for prompt in ([*A, *first, *B], edited, A[:3], [*A[:3], *B]):
        assert (
            spoken(talker, prompt, conversation, max_tokens=5)[0]
            == (spoken(talker, prompt, max_tokens=5)[0])
        )


def test_a_cancelled_answer_leaves_a_cache_that_can_be_used() -> None:
    talker, conversation, cancelled = speaker(), Conversation(), threading.Event()
    stream = talker.stream(
        A, Sampling(temperature=0, max_tokens=60), cancelled=cancelled, conversation=conversation
    )
    part = list(next(stream).ids)
    cancelled.set()
    part += [token for piece in stream for token in piece.ids]
    assert conversation.length == len(A) + len(part) - 1
    going_on = [*A, *part, *B]
    ids, pieces = spoken(talker, going_on, conversation)
    assert ids == spoken(talker, going_on)[0]
    assert pieces[-1].figures.reused == len(A) + len(part) - 1


def test_a_short_window_is_set_back_only_while_it_holds_all() -> None:
    talker, conversation = speaker(family("mistral", sliding_window=64)), Conversation()
    spoken(talker, A, conversation)
    _, pieces = spoken(talker, [*A[:10], *B], conversation)
    assert pieces[-1].figures.reused == 10
    talker, conversation = speaker(family("mistral", sliding_window=16)), Conversation()
    spoken(talker, A, conversation)
    _, pieces = spoken(talker, [*A[:10], *B], conversation)
    assert pieces[-1].figures.reused == 0
