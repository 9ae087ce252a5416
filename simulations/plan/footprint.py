"""What each side of a cut holds and computes: counted on a hollow model, by rehearsing its step.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from conf.schema import Config
from flower_app.build import cut_of
from flower_app.data.client import Batch
from models.anatomy import find_blocks
from simulations.plan.hollow import fill_hollow, hollow, outline_parts, tuned_whole
from simulations.plan.live import Live
from simulations.plan.operations import Operations
from simulations.plan.rehearsal import (
    OPTIMIZER,
    ClientSide,
    Phases,
    ServerSide,
    WholeSide,
    make_batch,
)
from strategies.optim import build_optimizer, trainable
from strategies.transport.codec.registry import crossings
from strategies.transport.payload import Parcel, Payload

HERE = "here"
"""The one side that a rehearsal counts for."""

MERGED = "merged"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a side holds at most during a step, in bytes, and what it computes."""

    parameters: int
    trainable: int
    weights: int
    """Bytes of parameters and buffers, a replica's and FedProx's anchor among them."""
    gradients: int
    optimizer: int
    peaks: Mapping[str, int]
    """Most bytes held, by phase."""
    common: int
    """Of the peak, what a further session would not add."""
    flops: Mapping[str, float]
    """By phase, of one micro-batch."""

    @property
    def peak(self) -> int:
        """Most bytes held."""
        return max(self.peaks.values())

    @property
    def activations(self) -> int:
        """What else there is when most is held: activations kept for the backward, and what an
        operation takes for a moment."""
        return max(0, self.peak - self.weights - self.gradients - self.optimizer)

    def stretched(self, larger: Footprint, times: float) -> Footprint:
        """This, and so many times what a larger one has more: its blocks, if they are alike."""

        def line(first: Any, second: Any) -> Any:
            if isinstance(first, Mapping):
                return {key: line(first[key], second[key]) for key in first}
            return round(first + times * (second - first))

        own, other = vars(self), vars(larger)
        return Footprint(**{name: line(own[name], other[name]) for name in own})


class _Side(Protocol):
    def step(self) -> None: ...


def client_footprint(shape: PretrainedConfig, config: Config) -> Footprint:
    """Both ends of a client, at the configured cut."""
    kind = received(config)
    bottom, _, top = outline_parts(shape, config, cut_of(config))
    with hollow():
        fill_hollow([bottom, top])

        def make(micros: int, phases: Phases) -> _Side:
            batches = _batches(shape, config, micros)
            window = config.link.window
            return ClientSide(bottom, top, config.train, batches, phases, kind, window)

        return _measure([bottom, top], make, config)


def server_footprint(shape: PretrainedConfig, config: Config, clients: int = 1) -> Footprint:
    """The trunk and one session of it; under `merged`, one batch of all clients'."""
    kind, train = received(config), config.train
    sequences = train.batch_size * (clients if train.strategy == MERGED else 1)
    bottom, trunk, _ = outline_parts(shape, config, cut_of(config))
    window, wanted = config.link.window, bool(trainable(bottom))
    size = (sequences, config.data.context, trunk.hidden_size)
    with hollow():
        fill_hollow([trunk])

        def make(micros: int, phases: Phases) -> _Side:
            return ServerSide(trunk, train, size, micros, phases, kind, window, wanted)

        return _measure([trunk], make, config)


def whole_footprint(shape: PretrainedConfig, config: Config, blocks: int = 0) -> Footprint:
    """The unsplit model, tuned as the parts are, on one client; or its first so many blocks."""
    model = tuned_whole(shape, config, cut_of(config))
    if blocks:
        kept = model.get_submodule(find_blocks(model))
        assert isinstance(kept, nn.ModuleList)
        del kept[blocks:]
    with hollow():
        fill_hollow([model])

        def make(micros: int, phases: Phases) -> _Side:
            return WholeSide(model, config.train, _batches(shape, config, micros), phases)

        return _measure([model], make, config)


def received(config: Config) -> torch.dtype:
    """Type in which a tensor comes out of the configured codec."""
    codec, parcel = crossings(config.link.codec, 0).h1, Parcel()
    sample = codec.encode(torch.ones(1, 1, 8), None, 0, 0, parcel)
    return codec.decode(sample, None, Payload(b"".join(parcel.parts)), "a sample").dtype


def vocabulary(shape: PretrainedConfig) -> int:
    """How many tokens there are."""
    return int(shape.get_text_config(decoder=True).vocab_size)


def _batches(shape: PretrainedConfig, config: Config, micros: int) -> Sequence[Batch]:
    words, (rows, tokens) = vocabulary(shape), (config.train.batch_size, config.data.context)
    return [make_batch(rows, tokens, words) for _ in range(micros)]


def _measure(
    modules: Sequence[nn.Module], make: Callable[[int, Phases], _Side], config: Config
) -> Footprint:
    """Rehearse one step. It is the first: moments, which every later one has, are added to what it
    holds before it makes them."""
    parameters = distinct(p for module in modules for p in module.parameters())
    train = trainable(*modules)
    gradients, moments = nbytes(train), _moments(train, config)
    live, peaks = Live(HERE), dict[str, int]()
    live.adopt([*parameters, *(b for module in modules for b in module.buffers())])
    common = live.now[HERE]

    def ended(phase: str) -> None:
        held = live.peak[HERE] + (0 if phase in OPTIMIZER else moments)
        peaks[phase] = max(peaks.get(phase, 0), held)
        live.forget_peak()

    # So many meet gradients, and fill a window's forwards and backwards; more change nothing.
    micros = min(config.train.accumulate, 2 * config.link.window)
    counter = Operations()
    with live, counter:
        phases = Phases(lambda: counter.flops, ended)
        side = make(micros, phases)
        weights = live.now[HERE]
        side.step()
    return Footprint(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in train),
        weights=weights,
        gradients=gradients,
        optimizer=moments,
        peaks=peaks,
        common=common,
        flops={name: spent / micros for name, spent in phases.spent.items()},
    )


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _moments(parameters: Sequence[nn.Parameter], config: Config) -> int:
    """Bytes that the optimizer keeps for these parameters."""
    optimizer = build_optimizer(list(parameters), config.train)
    if optimizer is None:
        return 0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = optimizer.state.values()
    return nbytes(t for state in states for t in state.values() if isinstance(t, Tensor))
