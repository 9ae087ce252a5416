"""An ordinary model whose trunk is elsewhere: a client's bottom and top around a remote block.

It is of the family's own class, so that `generate`, with whatever goes with it (sampling, beams,
streamers, assistants, caches that are copied or cropped), is `transformers`' own. The place of the
trunk's blocks is taken by one that hands its hidden states to a `RemoteTrunk`, and by others that
pass on what they are given.

Legend: B rows, L positions that are cached, T new ones, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from models.anatomy import set_module, share_copy
from models.cached import TRACED, new_cache, rows_of, stand_in
from models.elsewhere import Crossed, RemoteSession, RemoteTrunk, Tally
from models.flow import Skip, Vacant, halt_hook, hidden_states
from models.parts import Part


def join_remote(bottom: Part, top: Part, trunk: RemoteTrunk) -> PreTrainedModel:
    """Make one model of a client's ends and a trunk that is elsewhere.

    Parameters
    ----------
    bottom, top : Part
        Of one model and cut; their parameters are shared, not copied.
    trunk : RemoteTrunk

    Returns
    -------
    PreTrainedModel
        In evaluation mode, of the family's own class; ``model.tally`` is a `Tally` of its forwards.
        A cache that it is given, or makes in `generate`, belongs to a session on the trunk; a deep
        copy of it to a fork of that. Without one, nothing is kept on the trunk. The parts are its
        `graft_ends`, for a draft model of the same.

    Raises
    ------
    ValueError
        If the parts do not belong together.
    """
    if (bottom.role, top.role) != ("bottom", "top") or bottom.cut != top.cut:
        raise ValueError(
            f"a bottom and a top of one cut make a model, not a {bottom.role} of {bottom.cut} and "
            f"a {top.role} of {top.cut}"
        )
    model = share_copy(bottom.model)
    for name, module in bottom.model.named_modules():
        if isinstance(module, Vacant):
            set_module(model, name, share_copy(top.model.get_submodule(name)))
    blocks, above = model.get_submodule(bottom.block_list), top.model.get_submodule(top.block_list)
    assert isinstance(blocks, nn.ModuleList)
    assert isinstance(above, nn.ModuleList)
    if len(bottom.blocks):
        _unhook(blocks[bottom.blocks.stop - 1])
    for i in top.blocks:
        blocks[i] = share_copy(above[i])
    between = range(bottom.blocks.stop, top.blocks.start)
    model.tally = Tally()
    model.graft_ends = (bottom, top)
    passage = _Passage(model, trunk, between)
    for i in between:
        skip = blocks[i]
        assert isinstance(skip, Skip)
        blocks[i] = _Passed(skip, passage.cross if i == between.start else None)
    model.register_forward_pre_hook(passage.enter, with_kwargs=True)
    model.register_forward_hook(passage.leave, always_call=True)
    return model.eval()


def _unhook(block: nn.Module) -> None:
    """The last block of a bottom ends the forward no more."""
    for key in [key for key, hook in block._forward_hooks.items() if hook is halt_hook]:
        del block._forward_hooks[key]


class _Passed(Skip):
    """Stands in the place of a trunk block; the first one crosses, the others pass it on."""

    def __init__(self, skip: Skip, cross: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__(skip, skip.graft_name, skip.graft_arity)
        self.graft_cross = cross

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h_BTD = hidden_states(args, kwargs)
        if self.graft_cross is not None:
            h_BTD = self.graft_cross(h_BTD)
        if self.graft_arity == 0:
            return h_BTD
        nothing_BTD = torch.full_like(h_BTD, float("nan"))
        return (h_BTD, *[nothing_BTD] * (self.graft_arity - 1))


@dataclass
class _Call:
    """One forward of the model, as it was asked for."""

    began: float
    mask: Any
    positions: Any
    cache: Cache | None
    token: Token[_Call] | None = None
    crossed: float = 0.0


class _Held:
    """The session that a cache belongs to, and how it stood after the last forward."""

    def __init__(self, session: RemoteSession, trunk: RemoteTrunk) -> None:
        self.session, self.trunk = session, trunk
        self.whole = False
        """Whether the last forward went through all layers."""
        self.length = 0
        self.mask_BL = torch.ones(0, 0, dtype=torch.bool)
        self._finalizer = weakref.finalize(self, session.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        """A copied cache goes on by itself."""
        fork = _Held(self.session.fork(), self.trunk)
        fork.length, fork.mask_BL, fork.whole = self.length, self.mask_BL, self.whole
        return fork


_CALL: ContextVar[_Call] = ContextVar("graft_remote_call")
_HELD = "graft_held"


class _Passage:
    """From the bottom to the top of one model by way of the trunk."""

    def __init__(self, model: PreTrainedModel, trunk: RemoteTrunk, between: range) -> None:
        self._config, self._tally, self._trunk = model.config, model.tally, trunk
        self._between = between
        self._signature = inspect.signature(model.forward)

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the model's forward: learn what it was asked for."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        cache = given.get("cache", given.get("past_key_values", given.get("cache_params")))
        if cache is None and given.get("use_cache"):
            kwargs["cache"] = cache = new_cache(self._config)
        if cache is None:
            kwargs["use_cache"] = False
        call = _Call(
            began=time.perf_counter(),
            mask=given.get("attention_mask"),
            positions=given.get("position_ids"),
            cache=cache,
        )
        call.token = _CALL.set(call)
        if cache is not None:
            self._check_whole(cache)
        return args, kwargs

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        """After it: what it took above the trunk."""
        call = _CALL.get()
        if call.crossed:
            self._tally.seconds_top += time.perf_counter() - call.crossed
        held = getattr(call.cache, _HELD, None)
        if held is not None and output is not None:
            held.whole = True
        assert call.token is not None
        _CALL.reset(call.token)
        # Threads that the trunk started meanwhile (gRPC's) keep a copy of the context: without this
        # they would keep the cache, which keeps its session, which keeps them.
        call.cache = call.mask = call.positions = call.token = None

    def cross(self, h_BTD: Tensor) -> Tensor:
        """Hand the bottom's output to the trunk."""
        if h_BTD.requires_grad:
            raise ValueError(
                "no gradient comes back through this model: call it under torch.no_grad(); what "
                "trains is a federation (graft run)"
            )
        call = _CALL.get()
        started = time.perf_counter()
        crossed = self._ask(call, h_BTD)
        tally, call.crossed = self._tally, time.perf_counter()
        tally.forwards += 1
        tally.positions += h_BTD.shape[0] * h_BTD.shape[1]
        tally.trips += crossed.trips
        tally.seconds_bottom += started - call.began
        tally.seconds_trunk += crossed.seconds
        tally.seconds_network += call.crossed - started - crossed.seconds
        tally.bytes_up += crossed.bytes_up
        tally.bytes_down += crossed.bytes_down
        return crossed.h_BTD.to(h_BTD)

    def _ask(self, call: _Call, h_BTD: Tensor) -> Crossed:
        if call.cache is None:
            session = self._trunk.open()
            try:
                mask_BT, positions_BT = _masked(call, h_BTD, 0), _positions(call, h_BTD, 0)
                return session.forward(
                    h_BTD, mask_BT=mask_BT, positions_BT=positions_BT, keep=False
                )
            finally:
                session.close()
        held = getattr(call.cache, _HELD, None)
        if held is None:
            held = self._held(call.cache)
        return self._go_on(call, held, h_BTD)

    def _check_whole(self, cache: Cache) -> None:
        """Refuse a cache of which this model's layers hold different texts, or not all of them."""
        held = getattr(cache, _HELD, None)
        if held is not None and held.trunk is not self._trunk:
            raise ValueError("this cache is another model's: each model needs one of its own")
        if held.whole if held is not None else not _is_begun(cache):
            # An error in the bottom leaves it half done, which nothing but success takes back.
            if held is not None:
                held.whole = False
            return
        raise ValueError(
            "this cache was left half done by an error, or was begun by another model: start with "
            "a new cache"
        )

    def _held(self, cache: Cache) -> _Held:
        """Open a session for a new cache."""
        if not isinstance(cache, DynamicCache) or not cache.layers:
            raise ValueError(
                f"a {type(cache).__name__} cannot be shared with a trunk that is elsewhere: leave "
                "cache_implementation unset, or pass a DynamicCache(config=model.config)"
            )
        held = _Held(self._trunk.open(), self._trunk)
        setattr(cache, _HELD, held)
        return held

    def _go_on(self, call: _Call, held: _Held, h_BTD: Tensor) -> Crossed:
        """One forward of a session, from where its cache stands now."""
        cache = call.cache
        assert cache is not None
        length = self._length(cache, held)
        rows = self._rows(cache, length)
        before_BL = held.mask_BL[list(rows), :length] if length else None
        mask_BT = _masked(call, h_BTD, length)
        if call.mask is not None or self._attends(cache):  # recurrent states have no past to mask
            _check_past(call, before_BL, length)
        whole = range(len(held.mask_BL)) if length else ()
        crossed = held.session.forward(
            h_BTD,
            mask_BT=mask_BT,
            positions_BT=_positions(call, h_BTD, length),
            rows=() if list(rows) == list(whole) else rows,
            length=length,
        )
        if mask_BT is None:
            mask_BT = torch.ones(h_BTD.shape[:2], dtype=torch.bool)
        held.mask_BL = mask_BT if before_BL is None else torch.cat([before_BL, mask_BT], 1)
        held.length = length + h_BTD.shape[1]
        stand_in(cache, self._between, h_BTD.shape[0], held.length)
        return crossed

    def _length(self, cache: Cache, held: _Held) -> int:
        """Positions that the cache holds now; a cache of recurrent states only goes on."""
        for i in self._between:
            if isinstance(layer := cache.layers[i], CacheLayerMixin):
                return layer.get_seq_length()
        return held.length

    def _attends(self, cache: Cache) -> bool:
        return any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)

    def _rows(self, cache: Cache, length: int) -> list[int]:
        """Which rows of the last forward these are."""
        for i in self._between:
            if length and isinstance(cache.layers[i], TRACED):
                return rows_of(cache, i).tolist()
        return []


def _is_begun(cache: Cache) -> bool:
    """Whether any layer of a cache holds something."""
    attending = (each for each in getattr(cache, "layers", ()) if isinstance(each, DynamicLayer))
    return any(layer.get_seq_length() for layer in attending)


def _masked(call: _Call, h_BTD: Tensor, length: int) -> Tensor | None:
    """Which new positions are no padding, (B, T) bool; None if all."""
    mask = call.mask
    if mask is None:
        return None
    want = (h_BTD.shape[0], length + h_BTD.shape[1])
    if not isinstance(mask, Tensor) or mask.shape != want:
        raise ValueError(
            f"attention_mask must be {want} (rows, cached and new positions) where the trunk is "
            f"elsewhere, not {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask)}"
        )
    new_BT = mask[:, length:].bool().cpu()
    return None if bool(new_BT.all()) else new_BT


def _check_past(call: _Call, before_BL: Tensor | None, length: int) -> None:
    """The trunk has its mask of what is cached; another one now would not be heard."""
    if before_BL is None:
        return
    told_BL = torch.ones_like(before_BL) if call.mask is None else call.mask[:, :length].bool()
    if not torch.equal(told_BL.cpu(), before_BL):
        raise ValueError(
            "attention_mask is another one for cached positions than when they were computed: "
            "start with a new cache"
        )


def _positions(call: _Call, h_BTD: Tensor, length: int) -> Tensor | None:
    """Where the new positions stand, (B, T); None if one after the other from `length`."""
    positions = call.positions
    if positions is None:
        return None
    B, T = h_BTD.shape[:2]
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != T:
        raise ValueError(f"position_ids must be ({B}, {T}), not {getattr(positions, 'shape', '?')}")
    plain_T = torch.arange(length, length + T, device=positions.device)
    if bool((positions == plain_T).all()):
        return None
    return positions.expand(B, T).cpu()
