"""A plan: what a split run will hold, compute, send and take, before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PretrainedConfig

from conf.schema import Config
from models import client_state
from models.cut import ROLES, Cut
from simulations.plan.cuts import Budgets, Memory, best_cut, some_cuts
from simulations.plan.footprint import MERGED, Footprint
from simulations.plan.frames import StepFrames, step_frames
from simulations.plan.hollow import outline_parts, read_shape
from simulations.plan.schedule import round_trips
from simulations.plan.seconds import Network, StepSeconds, step_seconds, whole_seconds
from simulations.plan.speed import Pieces, at_speed, count_operations, measure, torch_threads
from strategies.optim import trainable

STEPS = 100
"""Of a client in a round, where the configuration counts epochs of data that nobody has read."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a run is to take place."""

    network: Network
    clients: int
    client_speed: float = 0.0
    """Operations a second; 0: as this machine."""
    server_speed: float = 0.0
    steps: int = 0
    """Of a client in a round; 0: as configured."""
    budgets: Budgets = field(default_factory=Budgets)


def make_plan(config: Config, setting: Setting) -> dict[str, Any]:
    """Predict a run at the configured cut, and compare with other cuts and with no cut.

    Parameters
    ----------
    config : Config
        Model, cut, tuning, batch, optimizer, precision, codec, strategy.
    setting : Setting
        Network, machines, clients.

    Returns
    -------
    dict
        Plain numbers in bytes, operations and seconds; `words` puts it into words.

    Raises
    ------
    ValueError
        If the model cannot be split, or the cut leaves no trunk.
    """
    return Planner(config, setting).plan()


class Planner:
    """See `make_plan`; what hangs on this machine's speed can be timed again.

    Attributes
    ----------
    cut : Cut
        The configured one.
    memory : Memory
    frames : StepFrames
    """

    def __init__(self, config: Config, setting: Setting) -> None:
        _refuse_what_is_not_planned(config)
        self._config, self._setting = config, setting
        self.cut = Cut(config.cut.bottom, config.cut.top)
        self._shape: PretrainedConfig = read_shape(config)
        self._parts = outline_parts(self._shape, config, self.cut)
        self._blocks = self._parts[0].num_blocks_total
        self._micros = config.train.accumulate
        self._steps = setting.steps or config.train.local_steps or STEPS
        self.memory = Memory(self._shape, config, self._blocks, setting.clients)
        self._operations = count_operations(self._shape, config, self._blocks)
        self.time()

    def time(self) -> None:
        """Time what the setting gives no speed for, and the making of frames."""
        config, setting, measured = self._config, self._setting, dict[int, Pieces]()
        with torch_threads(1):
            bottom, trunk, _ = self._parts
            self.frames: StepFrames = step_frames(
                config,
                bottom.hidden_size,
                bottom_learns=bool(trainable(bottom)),
                trunk_learns=bool(trainable(trunk)),
            )

        def pieces(speed: float, threads: int) -> Pieces:
            if speed:
                return at_speed(self._operations, speed)
            if threads not in measured:
                measured[threads] = measure(self._shape, config, self._operations, threads)
            return measured[threads]

        self._client = pieces(setting.client_speed, config.runtime.client_threads)
        self._server = pieces(setting.server_speed, config.runtime.trunk_threads)

    def seconds(self) -> StepSeconds:
        """Of a step at the configured cut."""
        return self._seconds(self.cut)

    def plan(self) -> dict[str, Any]:
        """All of it."""
        best = best_cut(
            self._blocks,
            self.memory,
            self._setting.budgets,
            lambda cut: self._seconds(cut).total,
        )
        client, server = self.memory.client(self.cut), self.memory.server(self.cut)
        whole = self.memory.whole()
        return {
            "model": self._describe(),
            "setting": self._describe_setting(),
            "parts": {part.role: self._part(part) for part in self._parts},
            "client": _memory(client, self._setting.budgets.client),
            "server": _memory(server, self._setting.budgets.server)
            | {"sessions": self._setting.clients, "all": self.memory.server_peak(self.cut)},
            "flops": self._flops(client, server),
            "wire": self._wire(),
            "seconds": self._round(self.cut),
            "best": None if best is None else str(best),
            "alternatives": [self._row(cut) for cut in some_cuts(self._blocks, self.cut, best)],
            "unsplit": self._unsplit(whole),
        }

    def _describe(self) -> dict[str, Any]:
        config, text = self._config, self._shape.get_text_config(decoder=True)
        return {
            "name": config.model.path or config.experiment,
            "family": self._shape.model_type,
            "blocks": self._blocks,
            "width": self._parts[0].hidden_size,
            "vocabulary": text.vocab_size,
            "cut": str(self.cut),
            "tuning": {role: getattr(config.tuning, role) for role in ROLES},
            "rank": config.lora.rank,
            "dtype": config.model.dtype,
            "precision": config.train.precision,
            "wire": config.link.codec_words,
            "transport": config.link.transport,
            "optimizer": config.train.optimizer,
            "strategy": config.train.strategy,
            "batch": [config.train.batch_size, config.data.context],
            "accumulate": self._micros,
        }

    def _describe_setting(self) -> dict[str, Any]:
        setting = self._setting
        return {
            "bandwidth": setting.network.bandwidth,
            "latency": setting.network.latency,
            "clients": setting.clients,
            "steps": self._steps,
            "client_speed": setting.client_speed or self._achieved(self._client),
            "client_measured": not setting.client_speed,
            "server_speed": setting.server_speed or self._achieved(self._server),
            "server_measured": not setting.server_speed,
            "budgets": asdict(setting.budgets),
            "max_frame": round(self._config.link.max_frame_mb * 2**20),
        }

    def _achieved(self, pieces: Pieces) -> float:
        counted = sum(each.both for each in self._operations.blocks)
        return counted / sum(each.both for each in pieces.blocks)

    def _part(self, part: Any) -> dict[str, Any]:
        own = list(part.parameters())
        return {
            "blocks": len(part.blocks),
            "parameters": sum(p.numel() for p in own),
            "trainable": sum(p.numel() for p in own if p.requires_grad),
        }

    def _flops(self, client: Footprint, server: Footprint) -> dict[str, float]:
        # Under `merged`, what was rehearsed is one batch of all clients'.
        shared = self._setting.clients if self._config.train.strategy == MERGED else 1
        return {
            "client": self._micros * sum(client.flops.values()),
            "server": self._micros * sum(server.flops.values()) / shared,
            "unsplit": self._micros * whole_operations(self._operations),
        }

    def _wire(self) -> dict[str, Any]:
        frames, (rows, tokens) = self.frames, self._batch()
        ends = state_bytes(self._parts)
        return {
            "up": frames.up,
            "down": frames.down,
            "per_token": (frames.up + frames.down) / (rows * tokens * self._micros),
            "largest_frame": frames.largest,
            "round_trips": round_trips(self._micros, self._config.link.window),
            "ends": ends,
            "round_up": self._steps * frames.up + ends,
            "round_down": self._steps * frames.down + ends,
        }

    def _batch(self) -> tuple[int, int]:
        return self._config.train.batch_size, self._config.data.context

    def _seconds(self, cut: Cut) -> StepSeconds:
        return step_seconds(
            cut,
            self._client,
            self._server,
            self.frames,
            self._setting.network,
            clients=self._setting.clients,
            strategy=self._config.train.strategy,
            micros=self._micros,
            window=self._config.link.window,
        )

    def _round(self, cut: Cut) -> dict[str, float]:
        step = self._seconds(cut)
        ends = 2 * self._setting.network.transfer(state_bytes(self._parts))
        return asdict(step) | {"ends": ends, "round": self._steps * step.total + ends}

    def _row(self, cut: Cut) -> dict[str, Any]:
        budgets, step = self._setting.budgets, self._seconds(cut)
        client, server = self.memory.estimate(cut)
        if cut == self.cut:
            client, server = self.memory.client(cut).peak, self.memory.server_peak(cut)
        return {
            "cut": str(cut),
            "client_peak": round(client),
            "server_peak": round(server),
            "client_seconds": step.client,
            "server_seconds": step.server,
            "step": step.total,
            "fits": _fits(client, budgets.client) and _fits(server, budgets.server),
        }

    def _unsplit(self, whole: Footprint) -> dict[str, Any]:
        step = whole_seconds(self._client, self._micros)
        state = 4 * whole.trainable
        ends = 2 * self._setting.network.transfer(state)
        rounded = self._steps * step + ends
        return _memory(whole, self._setting.budgets.client) | {
            "step": step,
            "state": state,
            "round": rounded,
            "faster": rounded < self._round(self.cut)["round"],
        }


def _refuse_what_is_not_planned(config: Config) -> None:
    if config.train.sync == "step":
        raise ValueError(
            "train.sync=step is not planned: in each of its steps the gradients of both ends go "
            "up and their weights come down, which the bytes and seconds of a plan leave out; "
            "plan with train.sync=round"
        )


def whole_operations(pieces: Pieces) -> float:
    """Operations of one micro-batch in the unsplit model."""
    return pieces.ends.both + sum(each.both for each in pieces.blocks)


def state_bytes(parts: Any) -> int:
    """Bytes in which the ends travel at a round's end, one way: fp32, and a header for each."""
    bottom, _, top = parts
    state = client_state(bottom, top)
    return sum(4 * tensor.numel() + 128 + len(name) for name, tensor in state.items())


def _memory(footprint: Footprint, budget: int) -> dict[str, Any]:
    keys = ("parameters", "trainable", "weights", "gradients", "optimizer", "activations", "peak")
    found = {key: getattr(footprint, key) for key in keys}
    return found | {"fits": _fits(footprint.peak, budget)}


def _fits(count: float, budget: int) -> bool:
    return not budget or count <= budget
