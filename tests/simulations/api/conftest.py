"""A small model that has learned a few lines, and the server in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from openai import OpenAI
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from models.tiny import byte_llama
from simulations.api.app import Access
from simulations.api.serve import Server, Settings, listen
from simulations.talk.speaker import Speaker

CONTEXT = 256
TEXT = "One swallow makes no summer. Two make a déjà vu. Three make a flock, and the flock flies.\n"
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="session")
def speaker() -> Speaker:
    """Return a speaker of a byte-level model that knows TEXT, if not by heart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = byte_llama(32, 3, CONTEXT)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    tokenizer = ByT5Tokenizer(extra_ids=0, split_special_tokens=True)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return Speaker(model.eval(), tokenizer, "tiny")


@pytest.fixture(scope="session")
def server(speaker: Speaker) -> Iterator[str]:
    """Yield the URL of a server with a key."""
    settings = Settings(access=Access(key=KEY), parallel=2, queue=2)
    with listen("127.0.0.1", 0) as taken, Server(speaker, settings, taken).running() as url:
        yield url


@pytest.fixture
def client(server: str) -> Iterator[OpenAI]:
    """Yield OpenAI's own client of that server."""
    with OpenAI(base_url=server, api_key=KEY, max_retries=0) as made:
        yield made
