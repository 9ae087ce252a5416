from __future__ import annotations

import pytest

from conf.load import load_config
from conf.schema import Config
from simulations.audit.recorder import Recorder
from simulations.audit.recording import Recording, Scope
from simulations.audit.subject import subject_of

SMALL = [
    "data.context=24",
    "data.max_examples=60",
    "train.batch_size=4",
    "model.scratch={model_type: llama, vocab_size: 259, hidden_size: 32, intermediate_size: 48, "
    "num_hidden_layers: 3, num_attention_heads: 2, num_key_value_heads: 1, "
    "max_position_embeddings: 64, tie_word_embeddings: false, bos_token_id: null, "
    "eos_token_id: 1, pad_token_id: 0}",
]
SCOPE = Scope(clients=2, warm=2, steps=3, sequences=2)


def small(*overrides: str) -> Config:
    return load_config("demo", [*SMALL, *overrides])


def record(config: Config, scope: Scope = SCOPE, trained: str = "") -> Recording:
    return Recorder(subject_of(config, trained), scope).record()


@pytest.fixture(scope="session")
def recording() -> Recording:
    return record(small())
