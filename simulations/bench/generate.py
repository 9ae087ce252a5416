"""What a token costs with the trunk elsewhere, against the unsplit model with its cache.

Three processes, alike in every round: the unsplit model, a trunk that is served over gRPC on
loopback, and the clients, each session a thread with the ends of its own stream.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

from models import Cut
from models.tiny import byte_llama
from simulations.bench.worker import worker

CUT = Cut(bottom=2, top=1)
PROMPT = 32
"""Tokens before the first new one."""

SHAPES: dict[str, dict[str, Any]] = {
    "demo": byte_llama(128, 6, 512),
    "smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
"""Sizes of models with random weights: the demo's, and those of SmolLM2-135M."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured."""

    model: str = "smollm2"
    """A shape, or the folder of a model."""
    cut: Cut = CUT
    tokens: int = 256
    sessions: tuple[int, ...] = (1, 4, 16)
    rounds: int = 3
    wire: str = "fp32"
    threads: int = 1
    """Torch threads of every process."""


def bench_generate(asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; unsplit and split take turns, so that what else the machine does meets both.

    Parameters
    ----------
    asked : Asked
        What is measured.
    say : callable
        Takes a line of progress.

    Returns
    -------
    dict
        ``unsplit`` and ``split_1`` ...: median milliseconds per token (of all sessions together),
        tokens/s, and their ratio to unsplit; of ``split_*`` also what a session waits for a token,
        bytes per token each way, texts per forward of the trunk and its peak of keys and values.
        ``same``: whether all texts were the unsplit one's.

    Raises
    ------
    ValueError
        If there is no such model.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = _saved(asked.model, Path(folder) / "model")
        access = Path(folder) / "access"
        here = replace(asked, model=str(path))
        start = lambda *task: stack.enter_context(worker(*task, patience=30.0))[0]  # noqa: E731
        trunk = start(_serve, here, access)
        trunk.recv()
        unsplit, clients = start(_unsplit, here), start(_clients, here, access)
        found: dict[str, list[dict[str, Any]]] = {}
        for number in range(asked.rounds + 1):  # the first warms up
            for name, pipe, task in [
                ("unsplit", unsplit, 1),
                *((f"split_{n}", clients, n) for n in asked.sessions),
            ]:
                row = _measured(pipe, task, trunk)
                say(f"round {number}  {name:<9} {row['ms']:8.2f} ms a token")
                if number:
                    found.setdefault(name, []).append(row)
    return _summary(asked, found)


def _measured(pipe: Connection, task: int, trunk: Connection) -> dict[str, Any]:
    trunk.send("reset")
    trunk.recv()
    pipe.send(task)
    row: dict[str, Any] = pipe.recv()
    trunk.send("read")
    return {**row, **trunk.recv()}


def _saved(model: str, folder: Path) -> Path:
    """A folder of the model."""
    if model not in SHAPES:
        if not Path(model).is_dir():
            raise ValueError(f"--model {model} is no folder, and none of {', '.join(SHAPES)}")
        return Path(model)
    torch.manual_seed(0)
    sizes = dict(SHAPES[model])
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(sizes.pop("model_type"), **sizes))
    whole.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def _summary(asked: Asked, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def middle(name: str, key: str) -> float:
        return statistics.median(row[key] for row in found[name])

    base = middle("unsplit", "ms")
    result: dict[str, Any] = {
        name: {
            "ms_per_token": middle(name, "ms"),
            "tokens_per_second": 1000 / middle(name, "ms"),
            "ratio": middle(name, "ms") / base,
            "ms_a_session_waits": middle(name, "waits"),
            "bytes_up": middle(name, "up"),
            "bytes_down": middle(name, "down"),
            "texts_together": middle(name, "together") if name != "unsplit" else 1.0,
            "kv_mib": middle(name, "kv") if name != "unsplit" else 0.0,
        }
        for name in found
    }
    texts = {tuple(text) for rows in found.values() for row in rows for text in row["texts"]}
    result |= {"same": len(texts) == 1, "rounds": asked.rounds, "tokens": asked.tokens}
    result |= {
        "prompt": PROMPT,
        "threads": asked.threads,
        "wire": asked.wire,
        "cut": str(asked.cut),
    }
    return result | {"model": asked.model}


def _generate(model: PreTrainedModel, asked: Asked) -> list[int]:
    """The new tokens after the same prompt."""
    ids_BT = _prompt(model)
    output_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=False,
        min_new_tokens=asked.tokens,
        max_new_tokens=asked.tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    found: list[int] = output_BT[0, PROMPT:].tolist()
    return found


def _prompt(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(3, vocabulary, (1, PROMPT), generator=generator)


def _unsplit(pipe: Connection, asked: Asked) -> None:
    """The unsplit model, asked by its pipe."""
    from flower_app.serving.source import find_served, load_whole_model

    torch.set_num_threads(asked.threads)
    model = load_whole_model(find_served(asked.model, asked.cut))
    while _next(pipe) is not None:
        started = time.perf_counter()
        text = _generate(model, asked)
        ms = 1000 * (time.perf_counter() - started) / asked.tokens
        pipe.send({"ms": ms, "waits": ms, "up": 0.0, "down": 0.0, "texts": [text]})


def _serve(pipe: Connection, asked: Asked, access: Path) -> None:
    """A trunk that is served, until its pipe ends."""
    from conf.schema import LinkConfig
    from conf.sections.link import read_codecs
    from flower_app.serving.server import Server, Serving

    torch.set_num_threads(asked.threads)
    serving = Serving(
        sources=(("bench", asked.model),),
        access=access,
        cut=asked.cut,
        threads=asked.threads,
        link=LinkConfig(bind="127.0.0.1:0", codec=read_codecs(asked.wire)),
    )
    server = Server(serving)
    server.start()
    pipe.send(str(server.files[0]))
    engine, before = server.engines[0], (0, 0)
    while (task := _next(pipe)) is not None:
        if task == "reset":
            server.memory.peak, before = 0, engine.forwards
        forwards, texts = (now - then for now, then in zip(engine.forwards, before, strict=True))
        together = texts / max(1, forwards)
        pipe.send({"kv": server.memory.peak / 2**20, "together": together})
    server.stop()


def _clients(pipe: Connection, asked: Asked, access: Path) -> None:
    """Sessions of one client, each a thread."""
    from flower_app.serving.client import connect
    from models.remote import join_remote

    torch.set_num_threads(asked.threads)
    file = next(access.glob("client-*.json"))
    with connect(file, asked.model) as joined, ThreadPoolExecutor(max(asked.sessions)) as pool:
        from flower_app.serving.source import find_served, load_ends

        ends = load_ends(find_served(asked.model, asked.cut))
        while (number := _next(pipe)) is not None:
            models = [join_remote(*ends, joined.trunk) for _ in range(number)]
            started = time.perf_counter()
            texts = list(pool.map(lambda model: _timed(model, asked), models))
            wall, total = time.perf_counter() - started, number * asked.tokens
            pipe.send(
                {
                    "ms": 1000 * wall / total,
                    "waits": 1000 * wall / asked.tokens,
                    "up": sum(m.tally.bytes_up for m in models) / total,
                    "down": sum(m.tally.bytes_down for m in models) / total,
                    "texts": texts,
                }
            )


def _timed(model: PreTrainedModel, asked: Asked) -> list[int]:
    torch.set_num_threads(asked.threads)  # of this thread, too
    return _generate(model, asked)


def _next(pipe: Connection) -> Any:
    """The next task; None when the pipe has ended."""
    try:
        return pipe.recv()
    except EOFError:
        return None
