"""An answer is what `generate` makes, whole, in time, and the same whoever else is talking."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from simulations.talk.speaker import Conversation, Sampling, Speaker
from strategies.errors import TrunkError
from tests.simulations.talk.helpers import (
    CHATML,
    byte_level,
    bytes_tokenizer,
    speaker,
    spoken,
    text_of,
    tiny,
)

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = [107, 104, 111, 111, 114]  # "hello"


def _generated(model: Any, ids: list[int], seed: int = 0, **options: Any) -> list[int]:
    torch.manual_seed(seed)
    row = model.generate(torch.tensor([ids]), pad_token_id=0, **options)[0]
    return row[len(ids) :].tolist()


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 1.0}, {"do_sample": True, "top_k": 0}),
        (
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.3},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
             "repetition_penalty": 1.3},
        ),
    ],
)  # fmt: skip
def test_an_answer_is_what_generate_makes(sampling, options) -> None:
    talker = speaker()
    ids, pieces = spoken(talker, IDS, seed=5, **sampling)
    assert ids == _generated(talker.model, IDS, seed=5, max_new_tokens=12, **options)
    assert text_of(pieces) == talker.tokenizer.decode(ids)
    assert [piece.finish for piece in pieces[-2:]] == ["", "length"]
    assert pieces[-1].figures.tokens == 12
    assert pieces[-1].figures.prompt == 5


def test_a_seed_gives_the_same_answer_though_several_are_made_at_once() -> None:
    talker = speaker()
    before = torch.get_rng_state()

    def answer(seed: int) -> list[int]:
        return spoken(talker, IDS, temperature=1.0, seed=seed, max_tokens=25)[0]

    alone = [answer(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(4)))

    assert together == alone
    assert len({tuple(ids) for ids in alone}) == 4
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's numbers are used up


def test_without_a_seed_answers_differ() -> None:
    talker = speaker()
    answers = {tuple(spoken(talker, IDS, temperature=1.0)[0]) for _ in range(3)}
    assert len(answers) == 3


def test_the_end_token_ends_an_answer_and_is_no_text() -> None:
    model = tiny()
    greedy = _generated(model, IDS, max_new_tokens=12, do_sample=False)
    end = greedy[4]
    model.generation_config.eos_token_id = [258, end]  # several, as Llama 3 has
    ids, pieces = spoken(speaker(model), IDS)
    assert ids == greedy[: greedy.index(end) + 1]
    assert pieces[-1].finish == "stop"


def test_a_stop_string_ends_an_answer_before_itself() -> None:
    talker = speaker()
    text = text_of(spoken(talker, IDS, max_tokens=40)[1])
    stop = text[5:8]
    ids, pieces = spoken(talker, IDS, max_tokens=40, stop=(stop,))
    assert text_of(pieces) == text[: text.index(stop)]
    assert pieces[-1].finish == "stop"
    assert len(ids) < 40


def test_an_answer_can_be_cancelled_in_the_middle() -> None:
    talker, cancelled, conversation = speaker(), threading.Event(), Conversation()
    settings = Sampling(temperature=0, max_tokens=100)
    stream = talker.stream(IDS, settings, cancelled=cancelled, conversation=conversation)
    first = next(stream)
    cancelled.set()
    rest = list(stream)
    assert rest[-1].finish == "cancelled"
    assert rest[-1].figures.tokens < 100
    whole = _generated(talker.model, IDS, max_new_tokens=100, do_sample=False)
    got = [token for piece in (first, *rest) for token in piece.ids]
    assert got == whole[: len(got)]


def test_who_stops_reading_ends_the_answer() -> None:
    talker, conversation = speaker(), Conversation()
    before = threading.active_count()
    stream = talker.stream(IDS, Sampling(temperature=0, max_tokens=100), conversation=conversation)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert conversation.length < 100
    assert spoken(talker, IDS, conversation)[0] == spoken(talker, IDS)[0]


def test_an_answer_that_does_not_end_when_cancelled_is_no_longer_waited_for() -> None:
    """A trunk that does not answer; when it does at last, nobody is disturbed."""
    talker, conversation, cancelled = speaker(), Conversation(), threading.Event()
    right = spoken(talker, IDS)[0]
    late, calls = threading.Event(), []

    def hang(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            cancelled.set()
            late.wait(20)

    handle = talker.model.register_forward_pre_hook(hang)
    before = threading.active_count()
    began = time.monotonic()
    settings = Sampling(temperature=0, max_tokens=12)
    pieces = list(talker.stream(IDS, settings, cancelled=cancelled, conversation=conversation))
    assert time.monotonic() - began < 15
    assert pieces[-1].finish == "cancelled"
    assert conversation.length == 0
    handle.remove()
    assert spoken(talker, IDS, conversation)[0] == right
    held = conversation.length
    late.set()
    while threading.active_count() > before:
        time.sleep(0.01)
    assert conversation.length == held
    assert spoken(talker, [*IDS, *right], conversation)[0] == spoken(talker, [*IDS, *right])[0]


def test_a_conversation_holds_one_answer_at_a_time() -> None:
    talker, conversation = speaker(), Conversation()
    stream = talker.stream(IDS, Sampling(max_tokens=100), conversation=conversation)
    next(stream)
    with pytest.raises(ValueError, match="is being answered"):
        spoken(talker, IDS, conversation)
    stream.close()
    spoken(talker, IDS, conversation)


def test_an_answer_is_bounded_by_the_context_and_a_longer_prompt_is_refused() -> None:
    talker = speaker(tiny(context=16))
    ids, pieces = spoken(talker, IDS, max_tokens=50)
    assert len(ids) == 11
    assert pieces[-1].finish == "length"
    with pytest.raises(ValueError, match=r"16 tokens, and the model takes 16"):
        talker.stream([100] * 16, Sampling())


@pytest.mark.parametrize(
    ("ids", "words"), [([], "the prompt is empty"), ([400], "token 400, and the model knows 259")]
)
def test_prompts_that_cannot_be_are_refused_before_anything_runs(ids, words) -> None:
    with pytest.raises(ValueError, match=words):
        speaker().stream(ids)


def test_an_error_in_the_model_reaches_the_reader_and_the_conversation_goes_on() -> None:
    talker, conversation = speaker(), Conversation()
    right = spoken(talker, IDS)[0]
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise TrunkError("the trunk is gone: start it again", kind="closed")

    handle = talker.model.register_forward_pre_hook(fail)
    with pytest.raises(TrunkError, match="start it again"):
        spoken(talker, IDS, conversation)
    handle.remove()
    assert spoken(talker, IDS, conversation)[0] == right


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_tokens": 0}, "max_tokens=0: must be 1 or more"),
        ({"temperature": -1.0}, "temperature=-1.0: must be from 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -3}, "seed=-3"),
        ({"stop": ("",)}, "stop="),
    ],
)
def test_wrong_settings_are_refused_in_words(wrong, words) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


def test_the_models_own_settings_are_the_default() -> None:
    model = tiny()
    model.generation_config.temperature, model.generation_config.top_p = 0.6, 0.9
    assert (speaker(model).defaults.temperature, speaker(model).defaults.top_p) == (0.6, 0.9)


def test_a_chat_is_written_by_its_template_and_ends_where_a_turn_ends() -> None:
    tokenizer = byte_level(CHATML)
    talker = Speaker(tiny(), tokenizer, "chat")
    ids = talker.prompt([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert talker.prompts.turn_ends() == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_text_is_gone_on_with_where_there_is_no_template() -> None:
    talker = speaker()
    said = [("user", "a b"), ("assistant", " c"), ("user", "d")]
    ids = talker.prompt([{"role": role, "content": content} for role, content in said])
    assert bytes_tokenizer().decode(ids) == "a b c\nd"
    assert 1 not in ids  # no end token before the answer


def test_a_message_without_content_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="needs 'content' with text"):
        speaker().prompt([{"role": "user"}])


def test_processors_change_the_logits_of_each_step_before_a_token_is_drawn() -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(input_ids.shape[1])
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([70]), 0.0)

    seen: list[int] = []
    settings = Sampling(max_tokens=3)
    pieces = list(speaker().stream([5, 6], settings, processors=[Only()]))
    assert [token for piece in pieces for token in piece.ids] == [70] * 3
    assert seen == [2, 3, 4]
