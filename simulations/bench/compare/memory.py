"""What a client must hold: the memory of training the whole model, and of training its two ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Unpack

import psutil
import torch
from torch import Tensor

from conf.schema import Config
from flower_app.build import build_client
from flower_app.client import streamed
from flower_app.client.place import Place
from simulations.bench.compare.fedavg.app import load_model, plain_optimizer, train_steps
from simulations.bench.compare.flops import full_batch
from strategies.engine.lane import StepResult
from strategies.memory import peak_bytes
from strategies.transport.link import OfBack, OfCompute

STEPS = 3
_MIB = 2**20


def client_memory(config: Config) -> dict[str, dict[str, float]]:
    """Train for a few steps in a fresh process each, and measure how far its memory grows.

    Returns
    -------
    dict
        For ``whole`` and ``ends``: ``weights_mb``, and ``peak_mb``, the growth of the resident set
        from all that is imported to its peak: weights, activations, gradients, optimizer.
    """
    found = {}
    for role in ("whole", "ends"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[role] = pool.submit(_measure, role, config).result()
    return found


def _measure(role: str, config: Config) -> dict[str, float]:
    torch.set_num_threads(1)
    before = _start_peak()
    weights = (_train_whole if role == "whole" else _train_ends)(config)
    return {
        "weights_mb": round(weights / _MIB, 2),
        "peak_mb": round((peak_bytes() - before) / _MIB, 1),
    }


def _start_peak() -> int:
    """What this process holds now; where the kernel can, its peak begins anew (Linux)."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")
    return int(psutil.Process().memory_info().rss)


def _train_whole(config: Config) -> int:
    model = load_model(config)
    steps = [[full_batch(config)]] * STEPS
    train_steps(model, steps, config.train, plain_optimizer(model, config.train))
    return _bytes(model)


def _train_ends(config: Config) -> int:
    bottom, top = build_client(config)
    place = Place(seed=0, client="client-0", round=1, rounds=1)
    steps = [[full_batch(config)]] * STEPS
    streamed.train(bottom, top, Echo(), steps, STEPS, config.train, place)
    return _bytes(bottom, top)


def _bytes(*modules: torch.nn.Module) -> int:
    own = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.nbytes for p in own.values())


class Echo:
    """A link whose trunk does nothing and takes no memory."""

    def __init__(self) -> None:
        self.trunk_seconds, self.bytes_up, self.bytes_down = 0.0, 0, 0
        self._sent: deque[Tensor] = deque()

    def compute(
        self, step: int, micro: int, h_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfCompute]
    ) -> None:
        self._sent.append(h_BTD.clone())

    def computed(self) -> Tensor:
        return self._sent.popleft()

    def backward(
        self, step: int, micro: int, grad_BTD: Tensor, mask_BT: Tensor | None, **how: Unpack[OfBack]
    ) -> None:
        self._sent.append(grad_BTD.clone())

    def gradients(self) -> tuple[Tensor, float]:
        return self._sent.popleft(), 1.0

    def apply(
        self, step: int, counters: Any, gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        pass

    def applied(self) -> StepResult:
        return StepResult(step=0, grad_norm=1.0, lr=0.0)

    def close(self) -> None:
        pass
