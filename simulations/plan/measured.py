"""What a step really holds and sends: the real parts, engine and frames, in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

from conf.schema import Config
from flower_app.build import build_client, build_trunk
from flower_app.client.place import Place
from flower_app.client.streamed import Trainer
from simulations.plan.frames import FramedLink, open_session
from simulations.plan.live import Live
from simulations.plan.rehearsal import STEPS, alone, make_batch

CLIENT, SERVER = "client", "server"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One step, after one that made the optimizers' moments."""

    client_peak: int
    server_peak: int
    """Bytes of tensors, at most."""
    up: int
    down: int
    """Bytes of frames."""


def measure_step(config: Config, vocabulary: int) -> Measured:
    """Take two steps of the configured model from scratch, and watch the second.

    Parameters
    ----------
    config : Config
        With `model.scratch`.
    vocabulary : int
        Ids are drawn from it.
    """
    (bottom, top), trunk = build_client(config), build_trunk(config)
    gc.collect()
    live = Live(CLIENT)
    live.adopt([t for part in (bottom, top) for t in (*part.parameters(), *part.buffers())])

    def at_server(raw: bytes, answer: Callable[[bytes], bytes]) -> bytes:
        live.side = SERVER
        try:
            return answer(raw)
        finally:
            live.side = CLIENT

    rows, tokens = config.train.batch_size, config.data.context
    batches = [make_batch(rows, tokens, vocabulary) for _ in range(config.train.accumulate)]
    with live:
        live.side = SERVER
        live.adopt([*trunk.parameters(), *trunk.buffers()])
        talk = open_session(trunk, config, trunk.hidden_size)
        live.side = CLIENT
        link = FramedLink(config.link, talk, across=at_server)
        place = Place(seed=0, client="plan", round=1, rounds=1)
        train, window = alone(config.train), config.link.window
        trainer = Trainer(bottom, top, link, STEPS, train, place, window=window)
        trainer.step(0, batches)
        live.forget_peak()
        up, down = link.bytes_up, link.bytes_down
        trainer.step(1, batches)
    return Measured(
        client_peak=live.peak[CLIENT],
        server_peak=live.peak[SERVER],
        up=link.bytes_up - up,
        down=link.bytes_down - down,
    )
