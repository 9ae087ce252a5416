"""Which cut is the best within budgets: every one is estimated, from a few that are rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from transformers import PretrainedConfig

from conf.schema import Config
from models.cut import Cut
from simulations.plan.footprint import (
    Footprint,
    client_footprint,
    server_footprint,
    whole_footprint,
)
from simulations.plan.hollow import outline_parts
from simulations.plan.speed import block_shapes

LEAST = Cut(1, 1)
"""Without a block of its own, a bottom sends embeddings, which can be looked up."""

MANY = 8
"""Blocks up to which all are rehearsed."""

EQUAL = 0.03
"""Share of a step's seconds that decides nothing."""


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes that each side may hold; 0: any."""

    client: int = 0
    server: int = 0


class Memory:
    """Peaks of both sides at every cut.

    Parameters
    ----------
    shape : PretrainedConfig
    config : Config
    blocks : int
        Of the whole model.
    clients : int
        That train at the same time.
    """

    def __init__(self, shape: PretrainedConfig, config: Config, blocks: int, clients: int) -> None:
        self._shape, self._config, self._blocks, self._clients = shape, config, blocks, clients
        kept = outline_parts(shape, config, Cut(0, 0))[1]
        self._alike = len(set(block_shapes(kept))) == 1
        self.client, self._exact = cache(self._client), cache(self._server)

    def server_peak(self, cut: Cut) -> int:
        """Bytes that the server holds for all clients."""
        return for_all(self.server(cut), self._config, self._clients)

    def server(self, cut: Cut) -> Footprint:
        """One session; of many blocks that are alike, on the line through two and three of them."""
        trunk = self._blocks - cut.bottom - cut.top
        return self._exact(cut) if trunk <= MANY or not self._alike else self._on_line(trunk)

    def whole(self) -> Footprint:
        """The unsplit model on one client."""
        if self._blocks <= MANY or not self._alike:
            return whole_footprint(self._shape, self._config)
        two, three = (whole_footprint(self._shape, self._config, count) for count in (2, 3))
        return two.stretched(three, self._blocks - 2)

    def _on_line(self, trunk: int) -> Footprint:
        two, three = (self._exact(Cut(self._blocks - count, 0)) for count in (2, 3))
        return two.stretched(three, trunk - 2)

    def estimate(self, cut: Cut) -> tuple[float, float]:
        """Peaks of client and server, on the line through two rehearsals; exact for like blocks."""
        least = self._least()
        more = (_more(least, 1, 0), _more(least, 0, 1))
        client = self.client(least)
        if cut.bottom > least.bottom:
            client = client.stretched(self.client(more[0]), cut.bottom - least.bottom)
        if cut.top > least.top:
            base = self.client(least).peak
            higher = (cut.top - least.top) * (self.client(more[1]).peak - base)
        else:
            higher = 0
        trunk = self._blocks - cut.bottom - cut.top
        server = self._exact(cut) if self._blocks < 4 else self._on_line(trunk)
        return client.peak + higher, for_all(server, self._config, self._clients)

    def _client(self, cut: Cut) -> Footprint:
        return client_footprint(self._shape, at(self._config, cut))

    def _server(self, cut: Cut) -> Footprint:
        return server_footprint(self._shape, at(self._config, cut), self._clients)

    def _least(self) -> Cut:
        return LEAST if self._blocks > 3 else Cut(0, 0)


def at(config: Config, cut: Cut) -> Config:
    """The configuration with another cut."""
    return replace(config, cut=replace(config.cut, bottom=cut.bottom, top=cut.top))


def for_all(one: Footprint, config: Config, clients: int) -> int:
    """Bytes of a server with so many sessions, all at their peak at once."""
    if config.train.strategy == "splitfed-v1":
        return one.common + clients * (one.peak - one.common)
    return one.peak


def all_cuts(blocks: int) -> Iterator[Cut]:
    """Those with a block at either end, as far as there are enough."""
    least = LEAST if blocks > 2 else Cut(0, 0)
    for bottom in range(least.bottom, blocks):
        for top in range(least.top, blocks - bottom):
            yield Cut(bottom, top)


def best_cut(
    blocks: int, memory: Memory, budgets: Budgets, seconds: Callable[[Cut], float]
) -> Cut | None:
    """The fastest cut within the budgets; None if there is none.

    Of cuts that are as good as equally fast, the one that asks the least of a client; then the one
    with the deeper bottom, whose activations are further from the ids.
    """

    def fits(cut: Cut) -> bool:
        client, server = memory.estimate(cut)
        return (not budgets.client or client <= budgets.client) and (
            not budgets.server or server <= budgets.server
        )

    fitting = {cut: seconds(cut) for cut in all_cuts(blocks) if fits(cut)}
    if not fitting:
        return None
    least = min(fitting.values()) * (1 + EQUAL)
    fast = [cut for cut, each in fitting.items() if each <= least]
    return min(fast, key=lambda cut: (cut.bottom + cut.top, -cut.bottom))


def _more(cut: Cut, bottom: int, top: int) -> Cut:
    return Cut(cut.bottom + bottom, cut.top + top)


def some_cuts(blocks: int, *wanted: Cut | None) -> list[Cut]:
    """A few cuts to compare: those wanted, and from little to much at the client."""
    least = LEAST if blocks > 2 else Cut(0, 0)
    shares = (
        least,
        Cut(2, 1),
        Cut(2, 2),
        *(Cut(round(blocks * s), round(blocks * s)) for s in (0.125, 0.25)),
    )
    found = {cut: None for cut in (*wanted, *shares) if cut is not None}
    legal = [cut for cut in found if cut.bottom + cut.top < blocks]
    return sorted(legal, key=lambda cut: (cut.bottom + cut.top, cut.bottom))
