"""`train`: How the parts learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import ConfigError, one_of, setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How the parts learn. The trunk uses the same optimizer settings unless `trunk_lr` is set."""

    section: ClassVar[str] = "train"

    strategy: str = setting("splitfed-v1", rules.NAME)
    """splitfed-v1 (a trunk replica per client, averaged), splitfed-v2 (one trunk, in turns) or
    merged (one trunk, all clients' micro-batches as one batch), or what strategies/engine/policies
    holds besides."""
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
    patience: int = setting(0, rules.COUNT_OR_ZERO)
    """Evaluated rounds in a row without a lower held-out loss after which the run ends; 0: never.
    With `data.central_path` the loss is that of the central evaluation."""
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
    outlier_clip: float = setting(0.0, rules.NOT_NEGATIVE)
    """merged: largest norm of one client's gradient, in multiples of the cohort's median norm; 0:
    as it is, so that a step equals one of centralised training."""
    precision: str = setting("fp32", one_of("fp32", "bf16"))
    """Compute type: fp32 or bf16 (autocast)."""
    bridge: int = setting(0, rules.COUNT_OR_ZERO)
    """Inner width of the bridge that clients train beside the model, so that their ends can draft
    text without the trunk (docs/speculation.md); 0: none. It changes nothing of the model."""

    def _check_together(self) -> None:
        if self.local_steps == 0 and self.local_epochs == 0:
            raise ConfigError(
                "train.local_steps and train.local_epochs are both 0: set one of them",
                key="train.local_epochs",
            )
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(
                f"train.momentum ({self.momentum}) is for train.optimizer=sgd; adamw has "
                "train.betas",
                key="train.momentum",
            )

        for name, wanted in (("sync", "round"), ("global_batch", 0), ("outlier_clip", 0.0)):
            if self.strategy != "merged" and (value := getattr(self, name)) != wanted:
                raise ConfigError(
                    f"train.{name}={value} needs train.strategy=merged, not {self.strategy}: set "
                    f"that, or train.{name}={wanted}",
                    key=f"train.{name}",
                )
        if self.turns != "arrival" and self.strategy != "splitfed-v2":
            raise ConfigError(
                f"train.turns={self.turns} needs train.strategy=splitfed-v2, not {self.strategy}: "
                "there nobody takes turns; set that, or train.turns=arrival",
                key="train.turns",
            )
        if self.prox and self.sync == "step":
            raise ConfigError(
                f"train.prox ({self.prox:g}) has nothing to hold with train.sync=step, where no "
                "client's weights drift: set train.prox=0 or train.sync=round",
                key="train.prox",
            )
