"""Optimizers, schedules and clipping, alike on both sides of the cuts.

A client and its trunk each own a part of the gradient. They step alike because every rule here is a
pure function of what both know: the settings, the progress of the run, and the two square norms.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from conf.schema import TrainConfig

ALONE = threading.RLock()
"""Held while what belongs to the process is set: random numbers, torch's default type. So clients
may share a process, with each other and with the trunk."""

CLIP_EPSILON = 1e-6
"""As in `torch.nn.utils.clip_grad_norm_`, so that a clipped split step equals a whole one."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the run is: step `step` of `steps` in round `round` (from 1) of `rounds`."""

    round: int
    rounds: int
    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """Share of the run that lies behind, in [0, 1)."""
        return (self.round - 1 + self.step / self.steps) / self.rounds


def learning_rate(train: TrainConfig, progress: Progress, *, trunk: bool = False) -> float:
    """Learning rate of one optimizer step.

    Progress, not a step count, drives the schedule: clients with different numbers of steps in a
    round stay in phase with each other and with their trunk.
    """
    peak = train.trunk_lr if trunk and train.trunk_lr > 0 else train.lr
    done = progress.fraction
    if done < train.warmup:
        # The first step of a warm-up should move, so count it as done.
        ahead = (progress.step + 1) / progress.steps - progress.step / progress.steps
        return peak * min(1.0, (done + ahead / progress.rounds) / train.warmup)
    left = (1.0 - done) / (1.0 - train.warmup)
    if train.schedule == "constant":
        return peak
    if train.schedule == "linear":
        return peak * left
    if train.schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    raise ValueError(f"unknown schedule '{train.schedule}': use constant, linear or cosine")


def trainable(*modules: nn.Module) -> list[nn.Parameter]:
    """Parameters that are trained, each once even if modules share it (tied embeddings)."""
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                found.setdefault(id(parameter), parameter)
    return list(found.values())


def build_optimizer(
    parameters: list[nn.Parameter], train: TrainConfig
) -> torch.optim.Optimizer | None:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) or SGD; None if nothing is trained."""
    if not parameters:
        return None
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=train.lr,
            betas=tuple(train.betas),
            eps=train.eps,
            weight_decay=train.weight_decay,
        )
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
        )
    raise ValueError(f"unknown optimizer '{train.optimizer}': use adamw or sgd")


def square_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Squared Euclidean norm of the gradients; parameters without a gradient count as zero."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    return float(torch.nn.utils.get_total_norm(gradients)) ** 2


def add_proximal(
    parameters: Sequence[nn.Parameter], anchor: Sequence[torch.Tensor], mu: float
) -> None:
    """Add the gradient of FedProx's ``mu / 2 * ||w - anchor||^2`` (Li et al. 2020,
    arXiv:1812.06127) to gradients that are complete, so that clipping sees their sum."""
    with torch.no_grad():
        for parameter, first in zip(parameters, anchor, strict=True):
            pull = (parameter - first) * mu
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)


def clipped_step(
    optimizer: torch.optim.Optimizer | None, *, lr: float, norm: float, clip: float
) -> None:
    """Scale the gradients by the norm over **all** parts, step, and clear them.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or None
        None where a part is frozen: nothing happens.
    lr : float
        Learning rate of this step.
    norm : float
        Norm of the whole model's gradient: bottom, trunk and top together.
    clip : float
        Largest norm; 0 means no clipping.
    """
    if optimizer is None:
        return
    scale = clip / (norm + CLIP_EPSILON) if clip > 0 else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if scale < 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part, alike on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Mixed precision for a forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
