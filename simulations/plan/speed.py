"""Seconds that each block, and what is around them, takes: measured here, or by a given speed.

Measured is the real step on a part of one block with random weights: how fast a machine multiplies
depends on the shapes. What the call of a part takes besides its blocks (a session's checks, masks,
positions) is told apart by a second part of several blocks, where a block is not too large.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from conf.schema import Config
from models import Part
from models.buffers import make_buffers
from models.cut import Cut
from simulations.plan.footprint import client_footprint, received, server_footprint, vocabulary
from simulations.plan.hollow import fill, outline_parts
from simulations.plan.rehearsal import ClientSide, Phases, ServerSide, make_batch

ENOUGH = 12e9
"""Operations of a step that is timed; a larger batch is cut down to it, and the time scaled up."""

REPEATS = 5
PATIENCE = 2.0
"""Seconds after which a piece is not timed again."""

SEVERAL = 4
"""Blocks of the part that tells a call from its blocks."""

HEAVY = 2**24
"""Weights of a block beside which a call is nothing."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One block, or all that is around the blocks (``top`` besides), for one micro-batch."""

    forward: float
    backward: float
    step: float
    top: float = 0.0
    """Forward and backward of what is above the blocks, with the loss."""

    @property
    def both(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward + self.top


NOTHING = Piece(forward=0.0, backward=0.0, step=0.0)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Of a whole model: the ends without blocks, each block, and a call of the trunk besides."""

    ends: Piece
    blocks: Sequence[Piece]
    call: Piece = NOTHING


def count_operations(shape: PretrainedConfig, config: Config, blocks: int) -> Pieces:
    """Operations of each piece, in place of seconds; those of the optimizer are not counted."""
    kinds = block_kinds(shape, config, blocks)
    counted = {kind: _one(shape, config, kinds.index(kind)) for kind in set(kinds)}
    flops = client_footprint(shape, _cut(config, Cut(0, 0))).flops
    ends = Piece(
        forward=flops["bottom forward"], backward=flops["bottom backward"], step=0, top=flops["top"]
    )
    return Pieces(ends=ends, blocks=[counted[kind] for kind in kinds])


def at_speed(operations: Pieces, flops_per_second: float) -> Pieces:
    """Seconds at a given speed."""

    def scaled(piece: Piece) -> Piece:
        return Piece(**{name: each / flops_per_second for name, each in vars(piece).items()})

    return Pieces(ends=scaled(operations.ends), blocks=[scaled(each) for each in operations.blocks])


def measure(shape: PretrainedConfig, config: Config, operations: Pieces, threads: int) -> Pieces:
    """Time each kind of piece on this machine, with so many torch threads (0: torch's choice)."""
    kinds = block_kinds(shape, config, len(operations.blocks))
    counted = [each.both for each in operations.blocks]
    with torch_threads(threads):
        ends = _time_ends(shape, config, operations.ends.both)
        timed = {
            kind: _time_blocks(shape, config, range(first, first + 1), counted[first])
            for kind in dict.fromkeys(kinds)
            for first in [kinds.index(kind)]
        }
        blocks = [timed[kind] for kind in kinds]
        call = NOTHING
        several = range(min(SEVERAL, len(blocks)))
        if len(several) > 1 and _weights(kinds[0]) < HEAVY:
            together = _time_blocks(shape, config, several, sum(counted[: len(several)]))
            call = _call([blocks[i] for i in several], together)
    return Pieces(ends=ends, blocks=[less(each, call) for each in blocks], call=call)


def _call(alone: Sequence[Piece], together: Piece) -> Piece:
    """What each of some blocks spends alone, and all of them together but once."""
    times = len(alone) - 1

    def spare(name: str) -> float:
        return (sum(getattr(each, name) for each in alone) - getattr(together, name)) / times

    return Piece(forward=spare("forward"), backward=spare("backward"), step=spare("step"))


def less(piece: Piece, other: Piece) -> Piece:
    """The one without the other."""
    return Piece(**{name: each - getattr(other, name) for name, each in vars(piece).items()})


def _weights(kind: Any) -> int:
    _, shapes = kind
    return sum(math.prod(size) for _, size in shapes)


def block_kinds(shape: PretrainedConfig, config: Config, blocks: int) -> list[Any]:
    """For each block what it is like: blocks of one kind take the same time."""
    shapes = block_shapes(outline_parts(shape, config, Cut(0, 0))[1])
    types = getattr(shape.get_text_config(decoder=True), "layer_types", None) or [""] * blocks
    return list(zip(types, shapes, strict=True))


def block_shapes(trunk: Part) -> list[Any]:
    """Names and shapes of each block's weights."""
    blocks = trunk.model.get_submodule(trunk.block_list)
    assert isinstance(blocks, nn.ModuleList)
    return [tuple((name, tuple(p.shape)) for name, p in b.named_parameters()) for b in blocks]


def _one(shape: PretrainedConfig, config: Config, index: int) -> Piece:
    return _operations(shape, config, range(index, index + 1))


def _operations(shape: PretrainedConfig, config: Config, blocks: range) -> Piece:
    flops = server_footprint(shape, _around(config, shape, blocks)).flops
    return Piece(forward=flops["trunk forward"], backward=flops["trunk backward"], step=0)


def _time_blocks(
    shape: PretrainedConfig, config: Config, blocks: range, operations: float
) -> Piece:
    """A trunk of these blocks."""
    config = _small(_around(config, shape, blocks), operations / len(blocks))
    scale = operations / _operations(shape, config, blocks).both
    trunk = outline_parts(shape, config, _cut_of(config))[1]
    _make_real([trunk])
    size = (config.train.batch_size, config.data.context, trunk.hidden_size)
    spent = _time(lambda phases: ServerSide(trunk, config.train, size, 1, phases, received(config)))
    return Piece(
        forward=spent["trunk forward"] * scale,
        backward=spent["trunk backward"] * scale,
        step=spent["trunk step"],
    )


def _time_ends(shape: PretrainedConfig, config: Config, operations: float) -> Piece:
    config = _small(_cut(config, Cut(0, 0)), operations)
    flops = client_footprint(shape, config).flops
    scale = operations / (sum(flops.values()) or 1.0) if operations else 1.0
    bottom, _, top = outline_parts(shape, config, Cut(0, 0))
    _make_real([bottom, top])
    batch = make_batch(config.train.batch_size, config.data.context, vocabulary(shape))
    spent = _time(
        lambda phases: ClientSide(bottom, top, config.train, [batch], phases, received(config))
    )
    return Piece(
        forward=spent["bottom forward"] * scale,
        backward=spent["bottom backward"] * scale,
        step=spent["client step"],
        top=spent["top"] * scale,
    )


def _time(make: Callable[[Phases], Any]) -> dict[str, float]:
    """Median seconds of each phase of a step, after one that warms up."""
    phases = Phases(undisturbed_clock())
    side = make(phases)
    side.step()
    started = time.perf_counter()
    spent: list[dict[str, float]] = []
    while len(spent) < REPEATS and (not spent or time.perf_counter() - started < PATIENCE):
        phases.restart()
        side.step()
        spent.append(dict(phases.spent))
    return {name: statistics.median(each[name] for each in spent) for name in spent[0]}


def undisturbed_clock() -> Callable[[], float]:
    """Seconds that do not hang on who else uses the machine, as far as one thread works here."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _make_real(parts: Sequence[Part]) -> None:
    """Random weights in the place of an outline's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fill(parts, _random)
    for part in parts:
        make_buffers(part.model)


def _random(like: Tensor) -> Tensor:
    """Small random numbers; beyond 2^22 they repeat, which no kernel notices."""
    seed = torch.randn(min(like.numel(), 2**22)).mul_(0.02).to(like.dtype)
    return seed.repeat(-(-like.numel() // seed.numel()))[: like.numel()].view(like.shape)


def _small(config: Config, operations: float) -> Config:
    """With a batch cut down, rows first, until a step is short enough to be timed."""
    rows, tokens = config.train.batch_size, config.data.context
    share = min(1.0, ENOUGH / operations) if operations else 1.0
    fewer = max(1, int(rows * share))
    shorter = max(16, int(tokens * min(1.0, share * rows / fewer)))
    return replace(
        config,
        train=replace(config.train, batch_size=fewer),
        data=replace(config.data, context=min(tokens, shorter)),
    )


def _around(config: Config, shape: PretrainedConfig, blocks: range) -> Config:
    """With a trunk of these blocks."""
    count = int(shape.get_text_config(decoder=True).num_hidden_layers)
    return _cut(config, Cut(blocks.start, count - blocks.stop))


def _cut(config: Config, cut: Cut) -> Config:
    own = replace(config.cut, bottom=cut.bottom, top=cut.top)
    train = replace(config.train, accumulate=1, prox=0.0)
    return replace(config, cut=own, train=train)


def _cut_of(config: Config) -> Cut:
    return Cut(config.cut.bottom, config.cut.top)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many torch threads for a while; 0: torch's choice."""
    before = torch.get_num_threads()
    if count > 0:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
