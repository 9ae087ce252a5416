"""OpenAI's own client against the server: what it is answered is what the model says."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI

from simulations.api.app import Access
from simulations.api.serve import Server, Settings, listen
from simulations.talk.speaker import Speaker
from strategies.errors import TrunkError
from tests.simulations.api.conftest import CONTEXT, KEY, TEXT
from tests.simulations.api.helpers import PROMPT, encoded, greedy, logprobs_of

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]}
JSON = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


def plainly(speaker: Speaker, count: int) -> str:
    return speaker.tokenizer.decode(greedy(speaker, PROMPT, count))


def test_a_chat_is_answered_as_the_model_goes_on(client: OpenAI, speaker: Speaker) -> None:
    made = client.chat.completions.create(**ASKED, temperature=0, max_tokens=24)
    choice = made.choices[0]
    assert choice.message.content == plainly(speaker, 24)
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert made.usage
    counted = (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens)
    assert counted == (len(PROMPT), 24, len(PROMPT) + 24)
    assert made.system_fingerprint
    assert made.system_fingerprint.startswith("fp_")


def test_what_is_streamed_is_what_is_not(client: OpenAI) -> None:
    options: dict[str, Any] = {**ASKED, "n": 2, "seed": 7, "max_tokens": 40, "temperature": 1.3}
    whole = client.chat.completions.create(**options)
    said, ends, last = {0: "", 1: ""}, {}, None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        last = chunk
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
    assert [said[choice.index] for choice in whole.choices] == [
        choice.message.content for choice in whole.choices
    ]
    assert said[0] != said[1], "each of n is drawn for itself"
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert last is not None
    assert last.choices == []
    assert last.usage == whole.usage


def test_a_seed_repeats_itself_and_none_does_not(client: OpenAI) -> None:
    def texts(**options: Any) -> list[str]:
        made = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=16, temperature=1.5, n=2, **options
        )
        return [choice.text for choice in made.choices]

    assert texts(seed=5) == texts(seed=5)
    assert len({*texts(), *texts(), *texts(seed=5), *texts(seed=6)}) > 4


def test_logprobs_are_the_models_own_whatever_bends_the_choice(
    client: OpenAI, speaker: Speaker
) -> None:
    made = client.chat.completions.create(
        **ASKED, max_tokens=12, seed=1, temperature=1.7, top_p=0.9, frequency_penalty=1.5,
        logit_bias={str(encoded("w")[0]): 3}, logprobs=True, top_logprobs=3,
    )  # fmt: skip
    assert made.choices[0].logprobs
    said = made.choices[0].logprobs.content
    assert said
    ids = encoded(PROMPT) + [one.bytes[0] + 3 for one in said if one.bytes]
    expected = logprobs_of(speaker, ids)[len(PROMPT) - 1 :]
    for place, one in enumerate(said):
        token = ids[len(PROMPT) + place]
        assert one.logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
        best = expected[place].topk(3)
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
    assert "".join(one.token for one in said) == made.choices[0].message.content


def test_echo_scores_the_prompt_in_each_of_its_forms(client: OpenAI, speaker: Speaker) -> None:
    texts = [TEXT[:20], "déjà vu"]
    forms: list[Any] = [texts, [encoded(text) for text in texts]]
    for prompt in forms:
        made = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=2
        )
        assert [choice.text for choice in made.choices] == texts
        for choice, text in zip(made.choices, texts, strict=True):
            ids = encoded(text)
            expected = logprobs_of(speaker, ids)[:-1]
            right = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            assert choice.logprobs
            assert choice.logprobs.token_logprobs
            assert choice.logprobs.token_logprobs[0] is None
            assert choice.logprobs.token_logprobs[1:] == pytest.approx(right, abs=1e-4)
            assert choice.logprobs.top_logprobs
            assert max(choice.logprobs.top_logprobs[1].values()) == pytest.approx(
                float(expected[0].max()), abs=1e-4
            )
            assert choice.finish_reason == "length"
    assert made.usage
    assert made.usage.completion_tokens == 0
    assert made.choices[1].logprobs
    offsets = made.choices[1].logprobs.text_offset
    assert offsets == [0, 1, 1, 2, 3, 3, 4, 5, 6], "é and à are two tokens and one character each"


def test_what_ends_a_text_is_scored_too(client: OpenAI, speaker: Speaker) -> None:
    """lm-eval drops the one token that it had to ask for: it must be there, end of text or not."""
    end = str(speaker.tokenizer.eos_token_id)
    made = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=1, echo=True, logprobs=1, temperature=0,
        logit_bias={end: 100},
    )  # fmt: skip
    choice = made.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == PROMPT
    assert choice.logprobs
    assert choice.logprobs.tokens
    assert choice.logprobs.tokens[-1] == "</s>"
    assert len(choice.logprobs.tokens) == len(PROMPT) + 1


def test_text_ends_before_a_stop_string(client: OpenAI, speaker: Speaker) -> None:
    text = plainly(speaker, 40)
    stop = text[10:13]
    for stops in (stop, ["#", stop]):
        made = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=stops
        )
        assert made.choices[0].text == text[: text.index(stop)]
        assert made.choices[0].finish_reason == "stop"


def test_a_bias_and_penalties_change_the_text(client: OpenAI, speaker: Speaker) -> None:
    wanted = {str(encoded("#")[0]): 100, str(encoded("+")[0]): 99}
    options: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    biased = client.completions.create(**options, logit_bias=wanted)
    assert biased.choices[0].text == "######"
    apart = client.completions.create(**options, logit_bias=wanted, frequency_penalty=2)
    assert apart.choices[0].text == "#+#+#+"


def test_models_are_listed_and_described(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "graft"
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        client.models.retrieve("gpt-4o")


def test_errors_are_the_clients_own(client: OpenAI, server: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**{**ASKED, "model": "gpt-4o"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**ASKED, max_tokens=CONTEXT)
    assert long.value.code == "context_length_exceeded"
    assert f"{CONTEXT} tokens; you asked for {CONTEXT + len(PROMPT)}" in str(long.value)
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(**ASKED, tools=[{"type": "function", "function": {}}])  # type: ignore[list-item]
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="token 259 is not one of the model's 259"):
        client.completions.create(model="tiny", prompt=[259])
    with OpenAI(base_url=server, api_key="a-key-that-is-wrong", max_retries=0) as stranger:
        for ask in (stranger.models.list, lambda: stranger.chat.completions.create(**ASKED)):
            with pytest.raises(openai.AuthenticationError) as refused:
                ask()
            assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{", JSON, 400, "no JSON"),
        (b"[]", JSON, 400, "JSON object"),
        (b"[" * 100_000, JSON, 400, "no JSON"),
        (b"{}", {**JSON, "Content-Type": "text/plain"}, 415, "application/json"),
        (b" " * (8 * 2**20 + 1), JSON, 413, "at most 8,388,608"),
        (b"{}", {"Content-Type": "application/json"}, 401, "API key is needed"),
    ],
)
def test_bodies_that_cannot_be_are_refused_in_openais_form(
    server: str, body: bytes, headers: dict[str, str], status: int, words: str
) -> None:
    got = httpx.post(f"{server}/completions", content=body, headers=headers)
    assert got.status_code == status
    assert set(got.json()["error"]) == {"message", "type", "param", "code"}
    assert words in got.json()["error"]["message"]


def test_what_is_not_there_is_said_in_the_same_form(server: str) -> None:
    assert httpx.get(f"{server}/nothing").json()["error"]["message"] == "Not Found: GET /v1/nothing"
    assert httpx.get(f"{server}/completions").status_code == 405
    assert httpx.get(server.replace("/v1", "/health")).json()["status"] == "ok"
    allowed = httpx.options(f"{server}/models", headers={"Origin": "https://a.example"})
    assert "access-control-allow-origin" not in allowed.headers


def running(server: str) -> int:
    return int(httpx.get(server.replace("/v1", "/health")).json()["running"])


def until_idle(server: str) -> float:
    """Return the seconds until nothing runs any more."""
    start = time.monotonic()
    while running(server):
        assert time.monotonic() - start < 20, "an answer goes on though its client went away"
        time.sleep(0.02)
    return time.monotonic() - start


@pytest.fixture
def slowed(speaker: Speaker) -> Any:
    """Make each step of the model take 50 ms."""
    hook = speaker.model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    yield
    hook.remove()


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_ends_the_answer(
    server: str, slowed: None, speaker: Speaker, stream: bool
) -> None:
    never = {str(speaker.tokenizer.eos_token_id): -100}
    body = {**ASKED, "max_tokens": 200, "logit_bias": never, "stream": stream}  # 10 s at the least
    with httpx.Client(headers=JSON, timeout=1.0) as client:
        if stream:
            with client.stream("POST", f"{server}/chat/completions", json=body) as answer:
                lines = answer.iter_lines()  # held: the connection is closed with it
                next(lines)
                assert running(server) == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server}/chat/completions", json=body)
    assert until_idle(server) < 2


def test_so_many_are_answered_so_many_wait_and_the_others_are_told(
    server: str, slowed: None, speaker: Speaker
) -> None:
    def ask(_: int) -> str:
        with OpenAI(base_url=server, api_key=KEY, max_retries=0) as own:
            try:
                made = own.chat.completions.create(**ASKED, max_tokens=8, temperature=0)
            except openai.RateLimitError as refused:
                return str(refused)
            return made.choices[0].message.content or ""

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    refused = [answer for answer in answers if "429" in answer]
    assert len(refused) == 2
    assert all("2 requests are being answered and 2 wait" in answer for answer in refused)
    assert set(answers) - set(refused) == {plainly(speaker, 8)}


def test_a_trunk_that_is_away_is_503_before_and_an_event_within_a_stream(
    server: str, client: OpenAI, speaker: Speaker
) -> None:
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise TrunkError("no answer from 10.0.0.1:9000 within 5 s", kind="timeout")

    hook = speaker.model.register_forward_pre_hook(fail)
    try:
        limit = 0
        with pytest.raises(openai.InternalServerError) as away:
            client.chat.completions.create(**ASKED, max_tokens=4)
        assert away.value.status_code == 503
        assert away.value.code == "trunk_unavailable"
        assert "10.0.0.1" in str(away.value)
        calls, limit = 0, 3
        with pytest.raises(openai.APIError, match="trunk does not answer"):
            list(client.chat.completions.create(**ASKED, max_tokens=9, stream=True, logprobs=True))
    finally:
        hook.remove()
    assert client.chat.completions.create(**ASKED, max_tokens=4).choices


def test_a_fault_of_ours_is_500_and_is_told_to_the_log_alone(
    server: str, client: OpenAI, speaker: Speaker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("a secret of the inside")

    hook = speaker.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(**ASKED, max_tokens=4)
    finally:
        hook.remove()
    assert failed.value.status_code == 500
    assert "secret" not in str(failed.value)
    assert "a secret of the inside" in caplog.text


def test_without_a_key_only_this_machines_names_are_answered(speaker: Speaker) -> None:
    settings = Settings(access=Access(origins=["https://a.example"]))
    with listen("127.0.0.1", 0) as taken, Server(speaker, settings, taken).running() as url:
        assert httpx.get(f"{url}/models").status_code == 200
        rebound = httpx.get(f"{url}/models", headers={"Host": "evil.example"})
        assert rebound.status_code == 403
        assert "evil.example" in rebound.json()["error"]["message"]
        allowed = httpx.get(f"{url}/models", headers={"Origin": "https://a.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = httpx.get(f"{url}/models", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_tokens_are_told_as_lm_eval_asks(server: str) -> None:
    root = server.replace("/v1", "")
    assert httpx.get(f"{root}/tokenizer_info", headers=JSON).json()["eos_token"] == "</s>"
    asked = {"prompt": "é!", "add_special_tokens": False}
    tokens = httpx.post(f"{root}/tokenize", json=asked, headers=JSON).json()["tokens"]
    assert tokens == encoded("é!")
    back = httpx.post(f"{root}/detokenize", json={"tokens": tokens}, headers=JSON)
    assert back.json() == {"prompt": "é!"}


def test_events_are_written_as_openai_writes_them(server: str) -> None:
    body = {"model": "tiny", "prompt": "O", "max_tokens": 2, "temperature": 0, "stream": True}
    got = httpx.post(f"{server}/completions", json=body, headers=JSON)
    assert got.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in got.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "text_completion" for chunk in chunks)
    assert "usage" not in chunks[0]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
