"""What runs in the place of the layers a part does not own, and how activations enter and leave.

A part calls the ordinary Hugging Face forward of the whole model. The blocks below its own are
`Skip`s, the last of which answers with the activations that were received; a hook on its own last
block stores the outcome and ends the forward. Modules that belong to another part are `Vacant`.
Both answer with NaN, so that nothing computed from a stand-in can pass for a result.

The state of one forward lives in a context variable set by that forward alone: parts, their deep
copies and threads cannot meet.

Legend: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Flow:
    """State of one forward of one part."""

    standin_BTD: Tensor
    """All NaN."""
    h_BTD: Tensor | None = None
    """Activations received from the part below."""
    out_BTD: Tensor | None = None
    """Activations to hand to the part above."""
    calls: list[str] = field(default_factory=list)
    """Names of the stand-ins in the order they were called."""


class Stop(BaseException):
    """Ends a forward after the last owned block; not an error."""


_FLOW: ContextVar[Flow] = ContextVar("graft_flow")


def run_with(flow: Flow, call: Callable[[], Any]) -> Any:
    """Run `call` with `flow` as its state; return None if a part's last block ended it."""
    token = _FLOW.set(flow)
    try:
        return call()
    except Stop:
        return None
    finally:
        _FLOW.reset(token)


def standin(batch: int, tokens: int, width: int, like: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a (B, T, D) tensor of NaN on the device of `like`."""
    device = like.device if like is not None else torch.device("cpu")
    return torch.full((batch, tokens, width), float("nan"), dtype=dtype, device=device)


class _Absent(nn.Module):
    """Base of the stand-ins: no tensors, but the plain attributes of the module it replaces."""

    def __init__(self, replaced: nn.Module, name: str) -> None:
        super().__init__()
        own = set(self.__dict__)
        for key, value in replaced.__dict__.items():
            if key not in own and not isinstance(value, (nn.Module, Tensor)):
                self.__dict__[key] = value
        for key, value in _plain_properties(replaced):
            self.__dict__.setdefault(key, value)
        self.graft_name = name


class Skip(_Absent):
    """A block of another part."""

    def __init__(self, block: nn.Module, name: str, arity: int, mode: str = "idle") -> None:
        super().__init__(block, name)
        self.graft_arity = arity
        self.graft_mode = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flow = _FLOW.get()
        flow.calls.append(self.graft_name)
        if self.graft_mode == "halt":
            flow.out_BTD = hidden_states(args, kwargs)
            raise Stop
        out = flow.h_BTD if self.graft_mode == "deliver" else flow.standin_BTD
        if self.graft_arity == 0:
            return out
        return (out, *[flow.standin_BTD] * (self.graft_arity - 1))


class Vacant(_Absent):
    """A module outside the blocks whose weights another part owns."""

    @property
    def weight(self) -> Tensor:
        """NaN (D,): some models ask a layer for the type of its weight."""
        return _FLOW.get().standin_BTD[0, 0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        flow = _FLOW.get()
        flow.calls.append(self.graft_name)
        return flow.standin_BTD


def deliver_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the first block of a trunk that has no block below it."""
    h_BTD = _FLOW.get().h_BTD
    if args:
        return (h_BTD, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": h_BTD}


def halt_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a part's last block: keep its output and stop."""
    _FLOW.get().out_BTD = output[0] if isinstance(output, (tuple, list)) else output
    raise Stop


def _plain_properties(module: nn.Module) -> list[tuple[str, Any]]:
    """Values of the properties that a block's class defines, as far as they are plain."""
    found = []
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        for key, value in vars(kind).items():
            if isinstance(value, property) and isinstance(
                plain := getattr(module, key, None), (str, int, float, bool)
            ):
                found.append((key, plain))
    return found


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments that a block was called with."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise ValueError("the model calls its blocks without hidden_states; it cannot be split")
    return found
