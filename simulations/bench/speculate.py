"""What speculation saves: tokens for each trip to the trunk, and time at several distances.

The trunk is in this process; a trip takes as long as it computes, and the round trip time on top,
which is slept.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conf.load import load_config
from flower_app.data.client import load_client_data
from flower_app.serving.source import Served, find_served, load_ends, load_tokenizer, load_trunk
from models import Cut
from models.elsewhere import Crossed, RemoteSession
from models.remote import join_remote
from simulations.talk.speculate import bridge_folders, speculation
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits

PROMPT = 64
"""Tokens of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be measured."""

    source: str
    """A run or a model, as `find_served` takes it."""
    cut: Cut | None = None
    bridge: Path | None = None
    """Folder of a bridge, if it is not beside the model."""
    data: Path | None = None
    """A text to take prompts of, besides the usual ones."""
    modes: tuple[str, ...] = ("off", "lookup", "bridge")
    rtts: tuple[float, ...] = (0.0, 0.02, 0.08)
    """Seconds."""
    prompts: int = 3
    tokens: int = 96
    """New ones, for each prompt."""
    draft_tokens: int = 0
    threads: int = 1


class Distant:
    """A trunk at a distance: each trip to another one takes so much longer."""

    def __init__(self, trunk: LocalTrunk, seconds: float = 0.0) -> None:
        self._trunk, self.seconds = trunk, seconds

    def open(self) -> DistantSession:
        """A session of it."""
        return DistantSession(self, self._trunk.open())


class DistantSession:
    """A session whose answers come later."""

    def __init__(self, trunk: Distant, session: RemoteSession) -> None:
        self._trunk, self._session = trunk, session

    def forward(self, *args: Any, **kwargs: Any) -> Crossed:
        """As the session that is far away, after the time to it and back."""
        crossed = self._session.forward(*args, **kwargs)
        time.sleep(self._trunk.seconds * crossed.trips)
        return crossed

    def fork(self) -> DistantSession:
        """One that begins with what this one has."""
        return DistantSession(self._trunk, self._session.fork())

    def close(self) -> None:
        """Let it go."""
        self._session.close()


def bench_speculate(question: Question, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every mode on every text, greedy and sampled, at every distance.

    Returns
    -------
    dict
        One entry a line of the table, by what was done.
    """
    torch.set_num_threads(question.threads)
    served = find_served(question.source, question.cut)
    bottom, top = load_ends(served)
    limits = Limits(length=0)
    trunk = Distant(LocalTrunk(GenerationEngine(load_trunk(served), limits)))
    model, tokenizer = join_remote(bottom, top, trunk), load_tokenizer(served)
    result: dict[str, Any] = {"model": served.description, "cut": str(served.cut)}
    for text, prompts in _texts(question, served, tokenizer).items():
        for drawn in (False, True):
            for mode in question.modes:
                name = f"{text}, {'sampled' if drawn else 'greedy'}, {mode}"
                options = _options(question, served, model, mode)
                result[name] = _row(question, model, trunk, prompts, drawn, options)
                say(f"{name}: {result[name]}")
    return result


def _options(
    question: Question, served: Served, model: PreTrainedModel, mode: str
) -> dict[str, Any]:
    own = [] if question.bridge is None else [question.bridge]
    folders = [*own, *bridge_folders(served)]
    return speculation(model, mode, folders=folders, tokens=question.draft_tokens)


def _row(
    question: Question,
    model: PreTrainedModel,
    trunk: Distant,
    prompts: Sequence[list[int]],
    drawn: bool,
    options: dict[str, Any],
) -> dict[str, float]:
    row: dict[str, float] = {}
    for rtt in question.rtts:
        trunk.seconds = rtt
        before, started, new = model.tally.copy(), time.perf_counter(), 0
        for number, ids in enumerate(prompts):
            torch.manual_seed(number)
            new += _speak(model, ids, question.tokens, drawn, options)
        seconds, done = time.perf_counter() - started, model.tally.copy() - before
        row.setdefault("tokens_per_trip", round(new / done.trips, 2))
        row[f"ms_per_token_at_{1000 * rtt:.0f}_ms"] = round(1000 * seconds / new, 1)
    return row


def _speak(
    model: PreTrainedModel, ids: list[int], tokens: int, drawn: bool, options: dict[str, Any]
) -> int:
    ids_BT = torch.tensor([ids])
    text_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=tokens,
        do_sample=drawn,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return int(text_BT.shape[1]) - len(ids)


def _texts(
    question: Question, served: Served, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """Prompts by what they are of: like the training text, of another kind, and one's own."""
    texts = {
        "training": _held_out(served, tokenizer),
        "code": [textwrap.dedent(Path(textwrap.__file__).read_text(encoding="utf-8"))],
    }
    if question.data is not None:
        texts[question.data.name] = [question.data.read_text(encoding="utf-8")]
    found = {}
    for name, whole in texts.items():
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole]
        found[name] = _prompts(ids, question.prompts)
    return found


def _held_out(served: Served, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a run's first client held out; of a model, passages of the demo's text."""
    place = str(served.run / "config.yaml") if served.run is not None else "demo"
    config = load_config(place)
    data = load_client_data(
        config.data, tokenizer, partition=0, partitions=2, data_path="", seed=config.seed
    )
    return [tokenizer.decode(each.input_ids, skip_special_tokens=True) for each in data.heldout]


def _prompts(ids: list[list[int]], count: int) -> list[list[int]]:
    long = [each for each in ids if len(each) >= PROMPT]
    if len(long) == 1:
        step = max(1, (len(long[0]) - PROMPT) // count)
        return [long[0][step * i : step * i + PROMPT] for i in range(count)]
    return [each[:PROMPT] for each in long[:: max(1, len(long) // count)][:count]]
