"""What every method starts from: a base model, a first adapter, and the text to be learned.

Nothing is downloaded. The base learns English prose, the documentation that ships with Python, and
the adapters then learn something else: Python source code, that of the standard library.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conf.load import load_config
from conf.schema import DataConfig, TrainConfig
from flower_app.data.client import load_client_data, load_tokenizer, steps
from models import build_scratch
from simulations.bench.compare.fedavg.app import plain_optimizer, train_steps
from simulations.bench.compare.settings import Compare, Start

SOURCES = "argparse ast calendar configparser dataclasses difflib inspect pathlib shutil textwrap"
"""Modules of the standard library, whose source code is learned."""

PASSAGE = 2048
"""Characters of one document."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_start(compare: Compare, folder: Path) -> Start:
    """Make base, adapter and text in a folder; the same each time, on one machine."""
    start = Start(base=folder / "base", adapter=folder / "adapter", data=folder / "code.jsonl")
    _write_text(start.data)
    _make_base(compare, start.base)
    whole = AutoModelForCausalLM.from_pretrained(start.base)
    lora = LoraConfig(
        r=compare.rank, lora_alpha=2 * compare.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(whole, lora).save_pretrained(start.adapter)
    return start


def _write_text(path: Path) -> None:
    passages = [each for name in SOURCES.split() for each in _passages(name)]
    lines = (json.dumps({"text": passage}) for passage in passages)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _passages(module: str) -> list[str]:
    found = importlib.util.find_spec(module)
    assert found is not None, module
    text = Path(str(found.origin)).read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    return [text[at : at + PASSAGE] for at in range(0, len(text) - PASSAGE + 1, PASSAGE)]


def _make_base(compare: Compare, folder: Path) -> None:
    """Train the base on prose, in this process."""
    model = build_scratch(compare.scratch, 0)
    tokenizer = load_tokenizer(load_config("demo").model)
    data = DataConfig(context=compare.context, heldout=0.0, max_examples=4000)
    examples = load_client_data(data, tokenizer, partition=0, partitions=1, seed=0).train
    train = TrainConfig(lr=3e-3, schedule="cosine")
    order = steps(
        examples, batch_size=8, accumulate=1, steps=compare.base_steps, pad_id=0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    train_steps(model, list(order), train, plain_optimizer(model, train))
    model.save_pretrained(folder)
