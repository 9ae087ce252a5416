from __future__ import annotations

import json
from pathlib import Path

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


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Prompts and answers of several lengths."""
    path: Path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"prompt": f"{n * n}, {'a' * (n % 7)}?", "completion": f"={n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return small(
        "data.source=files", f"data.path={path}", "data.partitioner=iid",
        "data.prompt_column=prompt", "data.completion_column=completion",
    )  # fmt: skip
