"""How long a step takes, put together from its pieces in the order in which they really follow."""

from __future__ import annotations

from dataclasses import dataclass

from models.cut import Cut
from simulations.plan.frames import StepFrames
from simulations.plan.schedule import Legs, round_trips, step_time
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
    together: float
    """That passes while something else above does, which `link.window` allows."""
    alone: float
    """All of it, if no other client trains."""
    total: float


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
    window: int = 1,
) -> StepSeconds:
    """Put a step together.

    A step is, for each micro-batch: bottom, h1 up, trunk, h2 down, top, dL/dh2 up, trunk, dL/dh1
    down, bottom. Then a last round trip asks for the trunk's optimizer step, while the client takes
    its own. With a window several micro-batches are under way at once, and the last round trip goes
    with the first of the next step; `schedule` follows it piece by piece.

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
    legs = _legs(cut, client, server, frames, network, micros)
    computing = micros * (legs.rising + legs.across + legs.back) + legs.client_step
    working = micros * (legs.forward + legs.backward)
    wire = network.transfer(frames.up) + network.transfer(frames.down)
    latency = round_trips(micros, window) * network.latency
    alone = step_time(legs, micros, window)
    first = legs.rising + legs.h1 + network.latency / 2
    total = {
        "splitfed-v2": max(alone, clients * (alone - first)),
        "merged": alone + (clients - 1) * working,
    }.get(strategy, max(alone, clients * (working + legs.trunk_step)))
    pieces = computing + working + legs.trunk_step + wire + latency + frames.seconds
    return StepSeconds(
        client=computing,
        server=working + legs.trunk_step,
        wire=wire,
        latency=latency,
        framing=frames.seconds,
        waiting=total - alone,
        together=max(0.0, pieces - alone),
        alone=alone,
        total=total,
    )


def _legs(
    cut: Cut, client: Pieces, server: Pieces, frames: StepFrames, network: Network, micros: int
) -> Legs:
    ranges, ends, call = cut.ranges(len(client.blocks)), client.ends, server.call
    bottom, top = ([client.blocks[i] for i in ranges[role]] for role in ("bottom", "top"))
    trunk = [server.blocks[i] for i in ranges["trunk"]]
    h1, h2, grad_h2, grad_h1 = (network.transfer(count) for count in frames.crossings)
    return Legs(
        rising=ends.forward + sum(each.forward for each in bottom),
        across=ends.top + sum(each.both for each in top),
        back=ends.backward + sum(each.backward for each in bottom),
        forward=call.forward + sum(each.forward for each in trunk),
        backward=call.backward + sum(each.backward for each in trunk),
        client_step=ends.step + sum(each.step for each in (*bottom, *top)),
        trunk_step=call.step + sum(each.step for each in trunk),
        h1=h1,
        h2=h2,
        grad_h2=grad_h2,
        grad_h1=grad_h1,
        # Each of four crossings is packed once and unpacked once.
        frame=frames.seconds / (8 * micros),
        latency=network.latency / 2,
    )


def whole_seconds(client: Pieces, micros: int) -> float:
    """One optimizer step of the unsplit model on a client."""
    pieces = [client.ends, *client.blocks]
    return micros * sum(each.both for each in pieces) + sum(each.step for each in pieces)
