"""A bridge for a model that was trained without one: learnt at the client, from text and the trunk.

The trunk sees activations of the text, as it does of any prompt, and keeps nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from conf.load import load_config
from flower_app.client.ends import on_device
from flower_app.client.plan import padding_id
from flower_app.data.client import Batch, batches, load_client_data
from flower_app.serving.client import connect
from flower_app.serving.source import find_served, load_ends, load_tokenizer, load_trunk
from models import Cut, Part
from models.bridge import Bridge, Regression, bridge_state, save_bridge
from models.elsewhere import RemoteTrunk
from strategies.generation.engine import GenerationEngine
from strategies.generation.local import LocalTrunk
from strategies.generation.memory import Limits


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a bridge is to learn, and how long."""

    data: Path | None = None
    """File or folder, as `data.path`; None: the demo's text."""
    context: int = 128
    """Tokens of each text."""
    batch_size: int = 8
    steps: int = 300
    width: int = 256
    seed: int = 0


def make_bridge(
    source: str,
    cut: Cut | None,
    access: Path | None,
    lesson: Lesson,
    folder: Path,
    say: Callable[[str], None],
) -> Path:
    """Make a bridge for what `source` names, and save it in a folder; returns the file.

    Parameters
    ----------
    source : str
        As `find_served` takes it; with `access`, where the ends are.
    cut : Cut, optional
        Of a model that does not say where it is cut.
    access : Path, optional
        Of a trunk that is served; None: one in this process.
    """
    if access is not None:
        with connect(access, source) as joined:
            ends = joined.model.graft_ends
            bridge = learn_bridge(ends[0], joined.trunk, joined.tokenizer, lesson, say)
    else:
        served = find_served(source, cut)
        trunk = LocalTrunk(GenerationEngine(load_trunk(served), Limits()))
        tokenizer = load_tokenizer(served)
        bridge = learn_bridge(load_ends(served)[0], trunk, tokenizer, lesson, say)
    return save_bridge(bridge_state(bridge), folder)


def learn_bridge(
    bottom: Part,
    trunk: RemoteTrunk,
    tokenizer: PreTrainedTokenizerBase,
    lesson: Lesson,
    say: Callable[[str], None],
) -> Bridge:
    """Teach a new bridge what the trunk does.

    Parameters
    ----------
    bottom : Part
        A client's.
    trunk : RemoteTrunk
        That it belongs to.
    say : callable
        Told how much the bridge still misses.

    Raises
    ------
    ValueError
        If the text cannot be read.
    TrunkError
        If the trunk cannot be reached, or refuses.
    """
    regression = Regression(Bridge(bottom.hidden_size, lesson.width, seed=lesson.seed))
    device, missed = next(bottom.parameters()).device, 0.0
    regression.bridge.to(device)
    session = trunk.open()
    try:
        for number, batch in enumerate(_texts(bottom, tokenizer, lesson), 1):
            ids, mask, _ = on_device(device, batch)
            with torch.no_grad():
                h1_BTD = bottom(ids, mask)
                real_BT = None if mask is None else mask.bool().cpu()
                h2_BTD = session.forward(h1_BTD, mask_BT=real_BT, keep=False).h_BTD
            missed += regression.learn(h1_BTD, h2_BTD.to(h1_BTD), mask)
            if number % 50 == 0:
                say(
                    f"step {number}/{lesson.steps}: misses {missed / 50:.3f} of what the trunk says"
                )
                missed = 0.0
    finally:
        session.close()
    return regression.bridge


def _texts(bottom: Part, tokenizer: PreTrainedTokenizerBase, lesson: Lesson) -> Iterator[Batch]:
    changes = [f"data.context={lesson.context}"]
    if lesson.data is not None:
        changes += ["data.source=files", f"data.path={lesson.data.absolute()}"]
        changes += ["data.partitioner=iid"]
    config = load_config("demo", changes)
    data = load_client_data(
        config.data, tokenizer, partition=0, partitions=1, data_path="", seed=lesson.seed
    )
    generator = torch.Generator().manual_seed(lesson.seed)
    fill = padding_id(bottom, tokenizer)

    def passes() -> Iterator[Batch]:
        while True:
            yield from batches(data.train, lesson.batch_size, pad_id=fill, generator=generator)

    return itertools.islice(passes(), lesson.steps)
