"""What a defence is: what is done to a client's tensors before they leave it.

A new defence is one file in this folder with a subclass of `Defence`; `privacy.defence` takes its
`name`.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from conf.sections.privacy import PrivacyConfig

_HELD = "graft_defence"


class Defence:
    """Changes h1 and dL/dh2 of one client; in training, evaluation and generation alike.

    A subclass gives a `name`, and implements what it changes.

    Parameters
    ----------
    config : PrivacyConfig
        Strengths.
    secret : bytes
        Of this client alone, for this run: what random numbers are made of. The server must not be
        able to guess it.
    """

    name: ClassVar[str] = ""

    def __init__(self, config: PrivacyConfig, secret: bytes) -> None:
        self.config, self.secret = config, secret

    def up(self, h1_BTD: Tensor, mask_BT: Tensor | None, place: str = "") -> Tensor:
        """What is sent as h1, differentiable: gradients go back the way the values came.

        The same tensor at the same place of the run must become the same again, for what is sent
        again or computed again is compared with what was sent. At another place it need not, and
        where noise hides it must not: who sees twice the same knows that two texts are the same.
        `mask_BT` is zero where there is padding, which does not travel; None: nowhere.
        """
        return h1_BTD

    def back(self, grad_BTD: Tensor, mask_BT: Tensor | None, place: str = "") -> Tensor:
        """What is sent as dL/dh2."""
        return grad_BTD

    def penalty(self, h1_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor | None:
        """What is added to the loss, a scalar; None: nothing. `h1_BTD` has its graph."""
        return None


def defend(bottom: nn.Module, top: nn.Module, defence: Defence | None) -> None:
    """Let a client's parts give out and give back only what the defence lets through.

    Parameters
    ----------
    bottom, top : nn.Module
        Called as `models.Part` is: the first argument, and the mask as the second one. What
        defended them before does so no more.
    defence : Defence, optional
        None: they are as they were.
    """
    for part in (bottom, top):
        if (held := _held(part)) is not None:
            held.handle.remove()
            object.__delattr__(part, _HELD)
    if defence is None:
        return

    def out(part: nn.Module, args: Any, kwargs: Any, h1_BTD: Tensor) -> Tensor:
        return defence.up(h1_BTD, _mask_of(args, kwargs), _place_of(part))

    def into(part: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        h2_BTD = _Guarded.apply(args[0], defence, _mask_of(args, kwargs), _place_of(part))
        return (h2_BTD, *args[1:]), kwargs

    _hold(bottom, bottom.register_forward_hook(out, with_kwargs=True), defence)
    _hold(top, top.register_forward_pre_hook(into, with_kwargs=True), defence)


def defence_of(part: nn.Module) -> Defence | None:
    """What defends a part."""
    held = _held(part)
    return held.defence if held else None


def say_place(part: nn.Module, *place: object) -> None:
    """Tell what defends a part where in the run its next calls are; the way back of a call belongs
    to the place of that call."""
    if (held := _held(part)) is not None:
        held.place = "/".join(map(str, place))


class _Guarded(Function):
    """Passes h2 on, and what comes back of its gradient through the defence."""

    @staticmethod
    def forward(
        ctx: Any, h2_BTD: Tensor, defence: Defence, mask_BT: Tensor | None, place: str
    ) -> Tensor:
        ctx.defence, ctx.mask_BT, ctx.place = defence, mask_BT, place
        return h2_BTD.view_as(h2_BTD)

    @staticmethod
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.defence.back(grad_BTD, ctx.mask_BT, ctx.place), None, None, None


def _mask_of(args: Any, kwargs: Any) -> Tensor | None:
    mask: Tensor | None = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    return mask


@dataclass
class _Held:
    """What a part has of its defence; a copy of the part has its own."""

    handle: RemovableHandle
    defence: Defence
    place: str = ""


def _hold(part: nn.Module, handle: RemovableHandle, defence: Defence) -> None:
    object.__setattr__(part, _HELD, _Held(handle, defence))


def _held(part: nn.Module) -> _Held | None:
    held: _Held | None = getattr(part, _HELD, None)
    return held


def _place_of(part: nn.Module) -> str:
    held = _held(part)
    return held.place if held else ""
