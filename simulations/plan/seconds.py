"""How long a step takes, put together from its pieces in the order in which they really follow."""

from __future__ import annotations

from dataclasses import dataclass

from models.cut import Cut
from simulations.plan.frames import StepFrames
from simulations.plan.speed import Pieces


@dataclass(frozen=True, kw_only=True)
class Network:
    """Between a client and the trunk."""

    bandwidth: float
    """Bits a second, each way."""
    latency: float
    """Seconds of a round trip."""

    def transfer(self, count: float) -> float:
        """Seconds for so many bytes, one way."""
        return 8 * count / self.bandwidth


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """One optimizer step of one client."""

    client: float
    server: float
    """Of this client's own work on the trunk."""
    wire: float
    """Bytes over the bandwidth."""
    latency: float
    """Round trips."""
    framing: float
    """Tensors to frames and back, on both sides."""
    waiting: float
    """For the trunk while it serves other clients."""
    alone: float
    """All of it, if no other client trains."""
    total: float


@dataclass(frozen=True, kw_only=True)
class _Legs:
    """Seconds of one micro-batch in each part, and of the optimizer steps."""

    rising: float
    across: float
    back: float
    trunk: float
    client_step: float
    trunk_step: float

    @property
    def client(self) -> float:
        return self.rising + self.across + self.back


def step_seconds(
    cut: Cut,
    client: Pieces,
    server: Pieces,
    frames: StepFrames,
    network: Network,
    *,
    clients: int,
    strategy: str,
    micros: int,
) -> StepSeconds:
    """Add up a step.

    A step is, for each micro-batch: bottom, h1 up, trunk, h2 down, top, dL/dh2 up, trunk, dL/dh1
    down, bottom. Then a last round trip asks for the trunk's optimizer step, while the client takes
    its own.

    Parameters
    ----------
    cut : Cut
    client, server : Pieces
        Seconds of each piece on either side.
    frames : StepFrames
        Of the whole step.
    network : Network
    clients : int
        That train at the same time.
    strategy : str
        How they share the trunk.
    micros : int
        Micro-batches of a step.
    """
    legs = _legs(cut, client, server)
    wire = network.transfer(frames.up) + network.transfer(frames.down)
    trips = (frames.round_trips - 1) * network.latency
    ending = max(legs.client_step, network.latency + legs.trunk_step)
    working = micros * legs.trunk
    alone = micros * legs.client + working + wire + frames.seconds + trips + ending
    first = legs.rising + network.transfer(frames.up) / (2 * micros) + network.latency / 2
    total = {
        "splitfed-v2": max(alone, clients * (alone - first)),
        "merged": alone + (clients - 1) * working,
    }.get(strategy, max(alone, clients * (working + legs.trunk_step)))
    return StepSeconds(
        client=micros * legs.client + legs.client_step,
        server=working + legs.trunk_step,
        wire=wire,
        latency=trips + network.latency,
        framing=frames.seconds,
        waiting=total - alone,
        alone=alone,
        total=total,
    )


def _legs(cut: Cut, client: Pieces, server: Pieces) -> _Legs:
    ranges, ends = cut.ranges(len(client.blocks)), client.ends
    bottom, top = ([client.blocks[i] for i in ranges[role]] for role in ("bottom", "top"))
    trunk = [server.blocks[i] for i in ranges["trunk"]]
    return _Legs(
        rising=ends.forward + sum(each.forward for each in bottom),
        across=ends.top + sum(each.both for each in top),
        back=ends.backward + sum(each.backward for each in bottom),
        trunk=server.call.both + sum(each.both for each in trunk),
        client_step=ends.step + sum(each.step for each in (*bottom, *top)),
        trunk_step=server.call.step + sum(each.step for each in trunk),
    )


def whole_seconds(client: Pieces, micros: int) -> float:
    """One optimizer step of the unsplit model on a client."""
    pieces = [client.ends, *client.blocks]
    return micros * sum(each.both for each in pieces) + sum(each.step for each in pieces)
