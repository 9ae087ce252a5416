"""Random numbers of one answer's own, for a `generate` that draws from torch's common ones."""

from __future__ import annotations

import secrets
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

_DRAWING = threading.Lock()
"""Held while a token is drawn: torch's generator is one for all threads."""

_CURRENT: ContextVar[Chance | None] = ContextVar("graft_chance", default=None)


class Chance:
    """Puts an answer's own state in place of torch's around each draw, under one lock.

    `generate` calls the logits processors, draws, and calls the stopping criteria. What it draws
    under a seed is what it draws after `torch.manual_seed` alone, though other answers draw in
    between. Assisted generation drafts, too, and calls no criteria between the draft and the model:
    a model that was told to `let_others_draw` keeps nobody waiting while it runs.
    """

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        begun = torch.Generator(self._device or "cpu")
        begun.manual_seed(secrets.randbits(63) if seed is None else seed)
        self._own = begun.get_state()
        self._common: Tensor | None = None
        self.before, self.after = _Before(self), _After(self)

    def __enter__(self) -> Chance:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.leave()
        _CURRENT.reset(self._token)

    def enter(self) -> None:
        """Put the answer's state in place, if it is not."""
        if self._common is None:
            _DRAWING.acquire()
            self._common = self._state()
            self._put(self._own)

    def leave(self) -> None:
        """Keep the answer's state and put back what was there."""
        if self._common is not None:
            self._own = self._state()
            self._put(self._common)
            self._common = None
            _DRAWING.release()

    def _state(self) -> Tensor:
        if self._device is not None:
            return torch.cuda.get_rng_state(self._device)
        return torch.get_rng_state()

    def _put(self, state: Tensor) -> None:
        if self._device is not None:
            torch.cuda.set_rng_state(state, self._device)
        else:
            torch.set_rng_state(state)


def let_others_draw(model: nn.Module) -> None:
    """Have a model let go of an answer's random numbers whenever it runs."""
    if not any(hook is _let_go for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_let_go)


def _let_go(module: nn.Module, args: Any) -> None:
    if (chance := _CURRENT.get()) is not None:
        chance.leave()


class _Before(LogitsProcessor):
    """Comes before the draw."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self._chance.enter()
        return scores


class _After(StoppingCriteria):
    """Comes after the draw; stops nothing."""

    def __init__(self, chance: Chance) -> None:
        self._chance = chance

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        self._chance.leave()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
