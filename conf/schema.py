"""Graft's configuration: frozen, keyword-only dataclasses that check themselves.

One `Config` reproduces a run. `conf.load` builds it from YAML and overrides; every section refuses
a wrong value in `__post_init__`, with the values and the remedy. What spans sections is refused by
`Config.check`, so that a bare `Config()` can be built.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from conf import combinations, rules
from conf.rules import ConfigError, one_of, setting


class _Section:
    """A part of the configuration: reads and checks each field, then what belongs together."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            key = f"{self.section}.{item.name}"
            value = rules.checked(
                getattr(self, item.name), str(item.type), item.metadata.get("rule"), key
            )
            object.__setattr__(self, item.name, value)
        self._check_together()

    def _check_together(self) -> None:
        pass


_TUNING = one_of("full", "lora", "frozen")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """Which model is split, and how it is held in memory."""

    section: ClassVar[str] = "model"

    path: str = ""
    """Folder, hub id or .gguf file of a checkpoint; `last:NAME` is the newest run of NAME.

    The folder may be of a PEFT adapter: its base is the one that it names, or `base`.
    """
    base: str = ""
    """Folder or hub id of the model that the adapter at `path` adapts; empty: as it says itself."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """A `transformers` config (with `model_type`) to train from random weights; excludes `path`.

    Its keys are the model's own and are checked when the model is built.
    """
    tokenizer: str = ""
    """Folder, hub id, or `bytes` (one token per UTF-8 byte); empty: the tokenizer beside `path`."""
    dtype: str = setting("fp32", one_of("fp32", "fp16", "bf16"))
    """Type of the weights in memory: fp32, fp16 or bf16."""
    attention: str = setting("sdpa", one_of("sdpa", "eager"))
    """Attention implementation of `transformers`: sdpa or eager."""
    allow_untested: bool = False
    """Split a model family that is not in the tested table."""

    def _check_together(self) -> None:
        combinations.check_model(self)


@dataclass(frozen=True, kw_only=True)
class CutConfig(_Section):
    """Where the model is cut, in blocks."""

    section: ClassVar[str] = "cut"

    bottom: int = setting(1, rules.COUNT_OR_ZERO)
    """Blocks that every client keeps below the trunk."""
    top: int = setting(1, rules.COUNT_OR_ZERO)
    """Blocks that every client keeps above the trunk."""


@dataclass(frozen=True, kw_only=True)
class TuningConfig(_Section):
    """What is trained in each part: full, lora or frozen."""

    section: ClassVar[str] = "tuning"

    bottom: str = setting("lora", _TUNING)
    trunk: str = setting("lora", _TUNING)
    top: str = setting("lora", _TUNING)

    def _check_together(self) -> None:
        combinations.check_tuning(self)


@dataclass(frozen=True, kw_only=True)
class LoraSettings(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), as in `peft.LoraConfig`."""

    section: ClassVar[str] = "lora"

    rank: int = setting(8, rules.COUNT)
    alpha: float = setting(16.0, rules.POSITIVE)
    dropout: float = setting(0.0, rules.BELOW_ONE)
    target_modules: tuple[str, ...] = setting((), rules.NAMES)
    """Names of the linear layers to adapt; empty: all linear layers of the blocks."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """What a client trains on.

    In deployment `--node-config "data-path=..."` names a node's own file instead of `path`.
    """

    section: ClassVar[str] = "data"

    source: str = setting("builtin", one_of("builtin", "files", "hub"))
    """builtin (English text of `pydoc_data.topics`), files, or hub."""
    path: str = ""
    """files: a file or folder (jsonl, csv, parquet, txt); hub: a data set id."""
    name: str = ""
    """hub: the configuration of the data set, if it has several."""
    split: str = setting("train", rules.NOT_EMPTY)
    """hub: the split to read."""
    text_column: str = setting("text", rules.NOT_EMPTY)
    """Column of plain text; not used with prompts or messages."""
    prompt_column: str = ""
    """With `completion_column`: prompt tokens are masked from the loss."""
    completion_column: str = ""
    """What is learned after the prompt; both are joined as they are, without a separator."""
    messages_column: str = ""
    """Chat messages, rendered with the tokenizer's chat template; assistant turns are learned."""
    partitioner: str = setting(
        "iid", one_of("iid", "natural", "dirichlet", "linear", "square", "exponential")
    )
    """iid, natural (no value of `partition_by` at two clients), dirichlet (uneven mixtures of its
    values), or sizes that grow with the client's number: linear, square, exponential."""
    partition_by: str = ""
    """Column for natural and dirichlet; builtin: `topic` if empty."""
    alpha: float = setting(0.5, rules.POSITIVE)
    """dirichlet: concentration; smaller is more uneven."""
    context: int = setting(128, rules.CONTEXT)
    """Most tokens in one example."""
    overlong: str = setting("chunk", one_of("chunk", "truncate", "refuse"))
    """A text longer than the context: chunk, truncate or refuse."""
    heldout: float = setting(0.1, rules.UP_TO_HALF)
    """Share of each client's examples kept for evaluation, in [0, 0.5]."""
    max_examples: int = setting(0, rules.COUNT_OR_ZERO)
    """Read at most this many examples per client, held-out ones included; 0: all."""

    def _check_together(self) -> None:
        combinations.check_data(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """How the parts learn. The trunk uses the same optimizer settings unless `trunk_lr` is set."""

    section: ClassVar[str] = "train"

    strategy: str = setting("splitfed-v1", one_of("splitfed-v1", "splitfed-v2", "merged"))
    """splitfed-v1 (a trunk replica per client, averaged), splitfed-v2 (one trunk, in turns) or
    merged (one trunk, all clients' micro-batches as one batch)."""
    sync: str = setting("round", one_of("round", "step"))
    """When clients' ends are averaged: round, or (merged only) step: all ends take one common step,
    as in centralised training."""
    global_batch: int = setting(0, rules.COUNT_OR_ZERO)
    """merged: examples in a step over all clients, drawn in proportion to their data; 0: every
    client takes `batch_size`."""
    prox: float = setting(0.0, rules.NOT_NEGATIVE)
    """FedProx: weight mu of the pull towards the round's first weights; 0: none."""
    turns: str = setting("arrival", one_of("arrival", "ordered"))
    """splitfed-v2: whose turn comes next: whoever asked first, or (ordered) by steps taken and then
    by name, once the whole cohort is there: it repeats exactly, whoever is quicker."""
    rounds: int = setting(3, rules.COUNT)
    local_steps: int = setting(0, rules.COUNT_OR_ZERO)
    """Optimizer steps per client and round; 0: use `local_epochs`."""
    local_epochs: int = setting(1, rules.COUNT_OR_ZERO)
    batch_size: int = setting(8, rules.COUNT)
    accumulate: int = setting(1, rules.COUNT)
    """Micro-batches per optimizer step."""
    optimizer: str = setting("adamw", one_of("adamw", "sgd"))
    """adamw or sgd."""
    lr: float = setting(1e-3, rules.POSITIVE)
    trunk_lr: float = setting(0.0, rules.NOT_NEGATIVE)
    """Learning rate of the trunk; 0: `lr`."""
    weight_decay: float = setting(0.0, rules.NOT_NEGATIVE)
    betas: tuple[float, float] = setting((0.9, 0.999), rules.BETAS)
    eps: float = setting(1e-8, rules.POSITIVE)
    momentum: float = setting(0.0, rules.BELOW_ONE)
    """sgd only."""
    schedule: str = setting("constant", one_of("constant", "linear", "cosine"))
    """constant, linear or cosine decay to zero over the whole run, after `warmup`."""
    warmup: float = setting(0.0, rules.BELOW_ONE)
    """Share of the run during which the learning rate grows linearly, in [0, 1)."""
    clip: float = setting(1.0, rules.NOT_NEGATIVE)
    """Largest norm of the gradient over all three parts together; 0: no clipping."""
    precision: str = setting("fp32", one_of("fp32", "bf16"))
    """Compute type: fp32 or bf16 (autocast)."""

    def _check_together(self) -> None:
        combinations.check_train(self)


@dataclass(frozen=True, kw_only=True)
class FederationConfig(_Section):
    """Who takes part in a round."""

    section: ClassVar[str] = "federation"

    fraction_train: float = setting(1.0, rules.POSITIVE_SHARE)
    fraction_evaluate: float = setting(1.0, rules.SHARE)
    min_clients: int = setting(2, rules.COUNT)
    """Wait until so many nodes are connected; at least so many are sampled."""
    sampling: str = setting("uniform", one_of("uniform", "weighted"))
    """How a cohort is drawn: uniform, or weighted by the clients' training examples."""
    oversample: float = setting(0.0, rules.NOT_NEGATIVE)
    """Ask this share more clients to train than the round needs; it ends with the first answers."""
    quorum: float = setting(0.0, rules.SHARE)
    """Share of the cohort that must answer for a round to count; 0: one client is enough."""
    retries: int = setting(0, rules.COUNT_OR_ZERO)
    """Times a round without quorum is tried again, with a cohort drawn anew."""
    round_timeout: float = setting(3600.0, rules.POSITIVE)
    """Seconds after which a round ends without the clients that have not answered."""


@dataclass(frozen=True, kw_only=True)
class AggregationConfig(_Section):
    """How what clients trained becomes one model. Under splitfed-v1 this includes the trunk."""

    section: ClassVar[str] = "aggregation"

    lora: str = setting("factors", one_of("factors", "ffa", "exact", "svd"))
    """factors (the mean of A and of B), ffa (A is frozen), exact (the mean of B.A; what the rank
    cannot hold goes into the base weights) or svd (the mean of B.A, cut to the rank)."""
    optimizer: str = setting("fedavg", one_of("fedavg", "fedavgm", "fedadam", "fedyogi"))
    """fedavg (the mean itself), or a server optimizer: fedavgm, fedadam, fedyogi."""
    lr: float = setting(0.0, rules.NOT_NEGATIVE)
    """Learning rate of the server optimizer; 0: 1 for fedavgm, 0.01 for fedadam and fedyogi."""
    momentum: float = setting(0.9, rules.BELOW_ONE)
    """fedavgm."""
    betas: tuple[float, float] = setting((0.9, 0.99), rules.BETAS)
    """fedadam, fedyogi."""
    tau: float = setting(1e-3, rules.POSITIVE)
    """fedadam, fedyogi: added to the root of the second moment."""

    def _check_together(self) -> None:
        combinations.check_aggregation(self)

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return self.lr or (1.0 if self.optimizer == "fedavgm" else 0.01)


@dataclass(frozen=True, kw_only=True)
class LinkConfig(_Section):
    """The data plane: how activations and gradients travel between a client and the trunk."""

    section: ClassVar[str] = "link"

    transport: str = setting("stream", one_of("stream", "messages"))
    """stream (gRPC, a port of its own) or messages (nothing but Flower's own, two for a step)."""
    bind: str = setting("127.0.0.1:0", rules.ADDRESS)
    """Address the trunk listens on; port 0: any free one (simulation)."""
    advertise: str = setting("", rules.ADDRESS_OR_EMPTY)
    """Address clients connect to, if it is not `bind` (a public name, a forwarded port)."""
    tls: str = setting("auto", one_of("auto", "on", "off"))
    """auto (off on loopback, else a certificate made for the run), on, or off."""
    certificate: str = ""
    """PEM file of the operator's certificate chain (with `key`), not one made for the run."""
    key: str = ""
    dtype: str = setting("fp32", one_of("fp32", "fp16", "bf16"))
    """Type of activations and gradients on the wire: fp32, fp16 or bf16."""
    timeout: float = setting(120.0, rules.POSITIVE)
    """Seconds that a client waits for a reply, and the trunk for a client's next frame."""
    max_frame_mb: float = setting(64.0, rules.POSITIVE)
    """Largest frame that is accepted, MiB; the trunk accepts none larger than a batch needs."""
    max_in_flight_mb: float = setting(4096.0, rules.POSITIVE)
    """Most activations whose step is not taken yet, over all sessions, MiB."""
    grace: float = setting(30.0, rules.POSITIVE)
    """Seconds that a client may be out of reach: so long the trunk keeps a session whose stream
    broke and the client tries to come back, and so long a newcomer's first answer is waited for."""

    def _check_together(self) -> None:
        combinations.check_link(self)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(_Section):
    """Threads and devices; one thread each is fastest if trunk and clients share a machine."""

    section: ClassVar[str] = "runtime"

    client_threads: int = setting(1, rules.COUNT_OR_ZERO)
    """torch threads of a client process; 0: torch's own choice."""
    trunk_threads: int = setting(1, rules.COUNT_OR_ZERO)
    client_device: str = setting("cpu", rules.DEVICE)
    trunk_device: str = setting("cpu", rules.DEVICE)


@dataclass(frozen=True, kw_only=True)
class OutputConfig(_Section):
    """What a run leaves."""

    section: ClassVar[str] = "output"

    folder: str = ""
    """Parent of the run folders; empty: `$GRAFT_HOME/runs`, by default `~/.graft/runs`."""
    log_every: int = setting(10, rules.COUNT)
    """Optimizer steps between progress lines."""
    save_model: bool = True
    checkpoint_every: int = setting(1, rules.COUNT_OR_ZERO)
    """Rounds between checkpoints, from which `resume` goes on; the last round has one. 0: none."""
    keep_checkpoints: int = setting(2, rules.COUNT)
    """How many of the last checkpoints stay; the one of the best held-out loss stays besides."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run."""

    experiment: str = setting("demo", rules.NOT_EMPTY)
    """Name of the experiment; set by `load_config`."""
    seed: int = setting(0, rules.SEED)
    """Seeds weights, partitions, held-out splits and the order of the examples."""
    model: ModelConfig = field(default_factory=ModelConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("experiment", "seed"):
                value = rules.checked(value, str(item.type), item.metadata["rule"], item.name)
                object.__setattr__(self, item.name, value)
            elif type(value).__name__ != item.type:
                raise ConfigError(f"{item.name} must be a {item.type}, got {value!r}")

    def check(self) -> Config:
        """Refuse what no section can refuse alone, and return self.

        Raises
        ------
        ConfigError
            If no model is named, its position table is shorter than `data.context`, nothing would
            be trained, or clients could not reach the trunk.
        """
        combinations.check_config(self)
        return self
