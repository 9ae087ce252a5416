"""How much a split step costs against an unsplit one: one client, real gRPC, two processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conf.schema import LinkConfig, TrainConfig
from conf.sections.link import read_codecs
from flower_app.client import streamed
from flower_app.client.place import Place
from flower_app.data.client import Batch
from models import Cut, split
from simulations.bench.worker import worker
from strategies.engine.engine import TrunkEngine
from strategies.optim import Progress, clipped_step, learning_rate, square_norm, trainable
from strategies.transport import tickets
from strategies.transport.codec.registry import crossings
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService
from strategies.transport.tickets import Guest, Ticket

Sizes = Mapping[str, int]

SIZES: Sizes = {"blocks": 12, "hidden": 256, "vocabulary": 1024, "batch": 4, "tokens": 64}
CUT = Cut(bottom=2, top=1)


def bench_step(steps: int = 40, warmup: int = 5, wire: str = "fp32") -> dict[str, Any]:
    """Time the split step of a Llama-like model against the unsplit step, in one run.

    Steps of both kinds take turns, so that whatever else the machine does meets both. AdamW runs in
    all parts; every process has one torch thread.

    Parameters
    ----------
    steps : int
        Timed steps of each kind.
    warmup : int
        Steps of each kind before the clock starts.
    wire : str
        Codec on the wire, as `link.codec`.

    Returns
    -------
    dict
        Median seconds of both, their ratio, bytes per step each way, and the sizes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    total = steps + warmup
    train, link = TrainConfig(lr=1e-4), LinkConfig(codec=read_codecs(wire))
    batch = make_batch()
    try:
        with _trunk_process(train, link, total) as (ticket, node_key):
            client = SplitStep(train, link, [batch], ticket, node_key, total)
            whole = WholeStep(train, [batch], total)
            times: dict[str, list[float]] = {"split": [], "unsplit": []}
            for index in range(total):
                for name, step in (("unsplit", whole), ("split", client)):
                    started = time.perf_counter()
                    step(index)
                    times[name].append(time.perf_counter() - started)
            up, down = client.link.bytes_up / total, client.link.bytes_down / total
            drift = abs(client.loss - whole.loss)
            client.link.close()
    finally:
        torch.set_num_threads(before)
    split_s, unsplit_s = (statistics.median(times[n][warmup:]) for n in ("split", "unsplit"))
    return {
        "benchmark": "step",
        **SIZES,
        "cut": str(CUT),
        "threads": 1,
        "wire": wire,
        "steps": steps,
        "unsplit_seconds": round(unsplit_s, 5),
        "split_seconds": round(split_s, 5),
        "ratio": round(split_s / unsplit_s, 4),
        "bytes_up_per_step": round(up),
        "bytes_down_per_step": round(down),
        "last_loss_difference": drift,
    }


class WholeStep:
    """The unsplit step, with the same optimizer code as the split one."""

    def __init__(
        self, train: TrainConfig, batches: Sequence[Batch], total: int, sizes: Sizes = SIZES
    ) -> None:
        self._model, self._train, self._total = make_model(sizes).train(), train, total
        self._batches, self._tokens = batches, sum(batch.tokens for batch in batches)
        self._parameters = trainable(self._model)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=train.lr, weight_decay=train.weight_decay
        )
        self.loss = 0.0

    def __call__(self, index: int) -> None:
        self.loss = 0.0
        for batch in self._batches:
            logits = self._model(batch.input_ids, use_cache=False).logits
            targets = batch.labels[:, 1:].flatten()
            total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
            loss = total / self._tokens
            loss.backward()
            self.loss += float(loss.detach())
        progress = Progress(round=1, rounds=1, step=index, steps=self._total)
        norm = square_norm(self._parameters) ** 0.5
        rate = learning_rate(self._train, progress)
        clipped_step(self._optimizer, lr=rate, norm=norm, clip=self._train.clip)


class SplitStep:
    """The client's side of the split step: what `streamed.train` does, a step a call."""

    def __init__(
        self,
        train: TrainConfig,
        link: LinkConfig,
        batches: Sequence[Batch],
        ticket: Ticket,
        node_key: bytes,
        total: int,
        sizes: Sizes = SIZES,
        cut: Cut = CUT,
    ) -> None:
        parts = split(make_model(sizes), cut)
        self.link = GrpcLink(ticket, node_key, steps=total, config=link)
        place = Place(seed=0, client="bench", round=1, rounds=1)
        self.trainer = streamed.Trainer(
            parts.bottom, parts.top, self.link, total, train, place, window=link.window
        )
        self._batches = batches
        self.loss = 0.0

    def __call__(self, index: int, last: bool = True) -> None:
        """Take a step; unless it is the last in a row, the next may begin before it has ended."""
        self.loss, _ = self.trainer.step(index, self._batches, None if last else self._batches)


def make_model(sizes: Sizes = SIZES) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes["vocabulary"],
                hidden_size=sizes["hidden"],
                intermediate_size=sizes["hidden"] * 8 // 3 // 32 * 32,
                num_hidden_layers=sizes["blocks"],
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=sizes["tokens"],
                tie_word_embeddings=False,
            )
        )


def make_batch(sizes: Sizes = SIZES, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes["batch"], sizes["tokens"])
    ids = torch.randint(0, sizes["vocabulary"], shape, generator=generator)
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)


@contextmanager
def _trunk_process(
    train: TrainConfig, link: LinkConfig, steps: int
) -> Iterator[tuple[Ticket, bytes]]:
    """A process that serves the trunk; yields a ticket to it and the key it is for."""
    crossings(link.codec, 0)  # a name that nobody offers is refused in this process, in words
    with worker(_serve, train, link) as (pipe, _):
        yield pipe.recv()


def _serve(pipe: Connection, train: TrainConfig, link: LinkConfig) -> None:
    torch.set_num_threads(1)
    trunk = split(make_model(), CUT).trunk
    engine = TrunkEngine(trunk, hidden_size=trunk.hidden_size, train=train)
    engine.open_round(1, 1, training=True)
    service = TrunkService(engine, link)
    service.start()
    node_key = tickets.new_key()
    guest = Guest(key="bench", client="bench", public_key=tickets.public_half(node_key))
    pipe.send((service.ticket(guest), node_key))
    try:
        pipe.recv()
    except EOFError:
        service.stop()
