"""What the comparison runs on: sizes, the methods, and one configuration for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conf.load import load_config, to_yaml
from conf.schema import Config
from models.tiny import byte_llama

CENTRAL, FEDAVG = "central", "fedavg"

METHODS: dict[str, tuple[str, ...]] = {
    CENTRAL: (),
    FEDAVG: (),
    "splitfed-v1": ("train.strategy=splitfed-v1",),
    "splitfed-v2": ("train.strategy=splitfed-v2", "train.turns=ordered"),
    "merged": ("train.strategy=merged", "train.sync=step"),
    "messages": ("train.strategy=splitfed-v1", "link.transport=messages"),
}
"""Each method, and what its configuration sets besides what all share."""

NAMES = {
    CENTRAL: "unsplit, central",
    FEDAVG: "unsplit, FedAvg-LoRA",
    "splitfed-v1": "splitfed-v1",
    "splitfed-v2": "splitfed-v2",
    "merged": "merged, sync=step",
    "messages": "splitfed-v1, messages",
}
"""What each is called in tables and figures."""

SAME = {"splitfed-v1": FEDAVG, "messages": FEDAVG, "merged": CENTRAL}
"""Methods whose model must equal that of an unsplit one, to fp32 rounding."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What is run. The defaults are the full comparison; `QUICK` has the same shape in small."""

    clients: int = 2
    rounds: int = 4
    local_steps: int = 8
    batch_size: int = 4
    context: int = 128
    hidden: int = 256
    blocks: int = 8
    cut: tuple[int, int] = (1, 1)
    rank: int = 8
    lr: float = 4e-3
    max_examples: int = 240
    """Of each client, held-out ones included."""
    base_steps: int = 90
    """Optimizer steps, of 8 sequences, in which the base model learns before."""
    slow: tuple[int, ...] = (1, 4, 16)
    """How many times slower a weak client computes."""
    megabits: tuple[int, ...] = (1000, 100)
    """Bandwidths of each client, in Mbit/s, each way."""
    weak_steps: int = 3
    """Timed steps of each point of the table of weak clients."""
    methods: tuple[str, ...] = tuple(METHODS)

    @property
    def scratch(self) -> dict[str, object]:
        """The config of the byte-level Llama that is the base."""
        return byte_llama(self.hidden, self.blocks, self.context)


QUICK = Compare(
    rounds=2, local_steps=3, hidden=64, blocks=4, max_examples=80, base_steps=40,
    slow=(1, 4), megabits=(100,), methods=tuple(name for name in METHODS if name != "splitfed-v2"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Start:
    """What every method starts from."""

    base: Path
    """Folder of the base model."""
    adapter: Path
    """Folder of the first LoRA adapter, as peft saves it."""
    data: Path
    """The text that is learned, a JSON lines file."""


def config_of(compare: Compare, start: Start, method: str, folder: Path) -> Config:
    """The configuration of a method; all but the strategy and the transport are alike.

    Parameters
    ----------
    compare, start
        Sizes, and the files to start from.
    method : str
        One of `METHODS`.
    folder : Path
        Where its run folder goes.
    """
    shared: Mapping[str, object] = {
        "model.path": start.adapter,
        "model.base": start.base,
        "model.tokenizer": "bytes",
        "cut.bottom": compare.cut[0],
        "cut.top": compare.cut[1],
        "lora.rank": compare.rank,
        "lora.alpha": 2 * compare.rank,
        "data.source": "files",
        "data.path": start.data,
        "data.context": compare.context,
        "data.max_examples": compare.max_examples,
        "train.rounds": compare.rounds,
        "train.local_steps": compare.local_steps,
        "train.batch_size": compare.batch_size,
        "train.lr": compare.lr,
        "train.schedule": "cosine",
        "train.warmup": 0.0,
        "federation.min_clients": compare.clients,
        "federation.quorum": 1.0,
        "output.folder": folder,
        "output.checkpoint_every": 0,
    }
    items = [f"{key}={value}" for key, value in shared.items()]
    return load_config("lora", [*items, *METHODS[method]])


def write_config(config: Config, path: Path) -> Path:
    """Write a configuration where `graft run` and the FedAvg app can read it; returns the path."""
    path.write_text(to_yaml(config), encoding="utf-8")
    return path
