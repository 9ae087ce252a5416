"""Graft's configuration: frozen, keyword-only dataclasses that check themselves.

One `Config` reproduces a run. `conf.load` builds it from YAML and overrides; every section refuses
a wrong value in `__post_init__`, with the values and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is split, and how it is held in memory."""

    path: str = ""
    """Folder or hub id of a `transformers` checkpoint; `last:NAME` is the newest run of experiment NAME."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """A `transformers` config (with `model_type`) to train from random weights; excludes `path`."""
    tokenizer: str = ""
    """Folder, hub id, or `bytes` (one token per UTF-8 byte); empty: the tokenizer beside `path`."""
    dtype: str = "fp32"
    """Type of the weights in memory: fp32, fp16 or bf16."""
    attention: str = "sdpa"
    """Attention implementation of `transformers`: sdpa or eager."""
    allow_untested: bool = False
    """Split a model family that is not in the tested table."""


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """Where the model is cut, in blocks."""

    bottom: int = 1
    """Blocks that every client keeps below the trunk."""
    top: int = 1
    """Blocks that every client keeps above the trunk."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What is trained in each part: full, lora or frozen."""

    bottom: str = "lora"
    trunk: str = "lora"
    top: str = "lora"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), as in `peft.LoraConfig`."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: all linear layers of the blocks."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a client trains on. In deployment `--node-config "data-path=..."` names a node's own file."""

    source: str = "builtin"
    """builtin (English text of `pydoc_data.topics`), files, or hub."""
    path: str = ""
    """files: a file or folder (jsonl, csv, parquet, txt); hub: a data set id."""
    name: str = ""
    """hub: the configuration of the data set, if it has several."""
    split: str = "train"
    """hub: the split to read."""
    text_column: str = "text"
    prompt_column: str = ""
    """With `completion_column`: prompt tokens are masked from the loss."""
    completion_column: str = ""
    messages_column: str = ""
    """Chat messages, rendered with the tokenizer's chat template; only assistant turns are learned."""
    partitioner: str = "iid"
    """iid, natural, dirichlet, linear or size-weighted; builtin/natural groups by topic."""
    partition_by: str = ""
    """Column for natural and dirichlet; builtin: `topic`."""
    alpha: float = 0.5
    """dirichlet: concentration; smaller is more uneven."""
    context: int = 128
    """Most tokens in one example."""
    overlong: str = "chunk"
    """A text longer than the context: chunk, truncate or refuse."""
    heldout: float = 0.1
    """Share of each client's examples kept for evaluation, in [0, 0.5]."""
    max_examples: int = 0
    """Read at most this many examples per client; 0: all."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the parts learn. The trunk uses the same optimizer settings unless `trunk_lr` is set."""

    strategy: str = "splitfed-v1"
    """splitfed-v1 (a trunk replica per client, averaged each round) or splitfed-v2 (one trunk, turns)."""
    rounds: int = 3
    local_steps: int = 0
    """Optimizer steps per client and round; 0: use `local_epochs`."""
    local_epochs: int = 1
    batch_size: int = 8
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    optimizer: str = "adamw"
    """adamw or sgd."""
    lr: float = 1e-3
    trunk_lr: float = 0.0
    """Learning rate of the trunk; 0: `lr`."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    """sgd only."""
    schedule: str = "constant"
    """constant, linear or cosine decay to zero over the whole run, after `warmup`."""
    warmup: float = 0.0
    """Share of the run during which the learning rate grows linearly, in [0, 1)."""
    clip: float = 1.0
    """Largest norm of the gradient over all three parts together; 0: no clipping."""
    precision: str = "fp32"
    """Compute type: fp32 or bf16 (autocast)."""


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who takes part in a round."""

    fraction_train: float = 1.0
    fraction_evaluate: float = 1.0
    min_clients: int = 2
    """Wait until so many nodes are connected; at least so many are sampled."""
    round_timeout: float = 3600.0
    """Seconds after which a round ends without the clients that have not answered."""


@dataclass(frozen=True, kw_only=True)
class LinkConfig:
    """The data plane: the gRPC stream between a client and the trunk."""

    bind: str = "127.0.0.1:0"
    """Address the trunk listens on; port 0: any free one (simulation)."""
    advertise: str = ""
    """Address clients connect to, if it is not `bind` (a public name, a forwarded port)."""
    tls: str = "auto"
    """auto (off on loopback, else a certificate made for the run), on, or off."""
    certificate: str = ""
    """PEM file of the operator's certificate chain (with `key`), instead of one made for the run."""
    key: str = ""
    dtype: str = "fp32"
    """Type of activations and gradients on the wire: fp32, fp16 or bf16."""
    timeout: float = 120.0
    """Seconds that a client waits for a reply, and the trunk for a client's next frame."""
    max_frame_mb: float = 64.0
    """Largest frame that is accepted, MiB."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Threads and devices. One torch thread each is fastest when trunk and clients share a machine."""

    client_threads: int = 1
    """torch threads of a client process; 0: torch's own choice."""
    trunk_threads: int = 1
    client_device: str = "cpu"
    trunk_device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves."""

    folder: str = ""
    """Parent of the run folders; empty: `$GRAFT_HOME/runs`, by default `~/.graft/runs`."""
    log_every: int = 10
    """Optimizer steps between progress lines."""
    save_model: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    experiment: str = "demo"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
