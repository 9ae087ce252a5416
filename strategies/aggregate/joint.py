"""The one model that a federation trains: clients' ends and the server's trunk, kept together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from conf.schema import Config
from models import Cut, Part, fold_residuals, in_ends, trainable_state
from models.residuals import RESIDUAL, residual_weights
from strategies.aggregate.masked import MaskedSum, add_up, take_masked
from strategies.aggregate.state import Contribution, GlobalState, Report
from strategies.engine.engine import TrunkEngine
from strategies.records import to_arrays


class JointModel:
    """What is trained, by name in the whole model, and who holds which of it.

    Parameters
    ----------
    engine : TrunkEngine
        Holds the trunk. Under splitfed-v1 its replicas are averaged with the clients' ends, so that
        a layer's mean is over all that trained it, wherever it ran.
    config : Config
        How it is averaged.
    """

    def __init__(self, engine: TrunkEngine, config: Config) -> None:
        self._engine, self._config = engine, config
        self._state = GlobalState(config)
        self._bases: dict[str, Tensor] = {}
        self._arrays: dict[tuple[int, int, int], ArrayRecord] = {}
        self.masked: MaskedSum | None = None
        """The clients' ends where the server may not read them, after the first round."""

    def start(self, ends: Mapping[str, Tensor]) -> None:
        """Set the clients' first tensors, where averaging needs to know them."""
        # Where there is one trunk, no client contributes to it.
        policy = self._engine.policy
        self._state.start({**ends, **(self._trunk_state() if policy.replicates else {})})
        policy.start_ends(ends)
        self._arrays.clear()

    def arrays_for(self, cut: Cut | None = None, rank: int = 0) -> ArrayRecord:
        """What a client starts a round from: the tensors of its ends, in its rank.

        Without a cut and a rank, one with the run's own.

        Empty before the first round: clients start from what the configuration says.
        """
        if self.masked is not None:
            return to_arrays(self.masked.tensors)
        cut, rank = cut or self._cut, rank or self._config.lora.rank
        place = (cut.bottom, cut.top, rank)
        if place not in self._arrays:
            found = self._state.tensors(lambda name: self._in_ends(name, cut), rank)
            self._arrays[place] = to_arrays(found)
        return self._arrays[place]

    def update(self, number: int, contributions: Sequence[Contribution]) -> Report:
        """Average a round, and give the trunk its part; returns how that went."""
        masked = [(each.masked, each.weight) for each in contributions if each.masked]
        total = add_up(masked) if masked else None
        report = self._state.update(number, contributions)
        self.masked = total
        if common := self._engine.policy.ends():
            # What the last step left; a client that ended before it holds something older.
            self._state.start(common)
            report = replace(report, anomalies={})  # having less data is none
        self._arrays.clear()
        own = self._trunk_state()
        kept = self._state.tensors(
            lambda name: not self._in_ends(name, self._cut), self._config.lora.rank
        )
        averaged = {name: kept[name] for name in own if name in kept}
        self._engine.policy.load(averaged)
        self._fold(kept)
        return report

    def told(self) -> Mapping[str, list[bytes] | int | bytes]:
        """What a message to a client says of masked ends that it brings."""
        return self.masked.told() if self.masked is not None else {}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later round depends on, besides the engine's state; sharing memory."""
        masked = self.masked.state_dict() if self.masked else {}
        return {**self._state.state_dict(), **masked}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state_dict`; the engine is at its own already."""
        self.masked, state = take_masked(state)
        self._state.load_state_dict(state)
        self._arrays.clear()
        self._fold(
            self._state.tensors(
                lambda name: not self._in_ends(name, self._cut), self._config.lora.rank
            )
        )

    def _fold(self, kept: Mapping[str, Tensor]) -> None:
        """Set the trunk's base weights to what they were at first plus the residuals in `kept`.

        As clients do, who rebuild theirs: sums of differences would depend on the rounds before.
        """
        residuals = {name: tensor for name, tensor in kept.items() if name.endswith(RESIDUAL)}
        if not residuals and not self._bases:
            return
        trunk = self._engine.trunk
        assert isinstance(trunk, Part)
        with torch.no_grad():
            for name, weight in residual_weights(trunk, {*residuals, *self._bases}).items():
                weight.copy_(self._bases.setdefault(name, weight.detach().clone()))
        fold_residuals(trunk, residuals)

    def tensors(self) -> dict[str, Tensor]:
        """All that was trained, and the residuals that belong to it, in the run's own rank."""
        return {
            **self._trunk_state(),
            **self._state.tensors(lambda name: True, self._config.lora.rank),
        }

    def _trunk_state(self) -> dict[str, Tensor]:
        return trainable_state(self._engine.trunk)

    @property
    def _cut(self) -> Cut:
        return Cut(bottom=self._config.cut.bottom, top=self._config.cut.top)

    def _in_ends(self, name: str, cut: Cut) -> bool:
        trunk: nn.Module = self._engine.trunk
        assert isinstance(trunk, Part)
        return in_ends(
            name, block_list=trunk.block_list, num_blocks=trunk.num_blocks_total, cut=cut
        )
