"""One disturbed run, from its plan to its verdict."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor

from conf.load import load_config
from conf.schema import Config
from flower_app.client_app import make_app
from flower_app.runs.recorder import Recorder
from flower_app.runs.resume import take_up
from flower_app.server_app import run_experiment
from simulations.disturb.faults import Faults, draw_schedule
from simulations.equality.inprocess import InProcessGrid, as_flower_runs_it, read_tensors
from strategies.errors import TrunkError
from strategies.transport.stream.link import GrpcLink
from strategies.transport.stream.service import TrunkService

CLIENTS, ROUNDS, STEPS, MICROS = 2, 2, 3, 3

POLICIES = {
    "splitfed-v1": "train.strategy=splitfed-v1",
    "splitfed-v2": "train.strategy=splitfed-v2 train.turns=ordered",
    "merged": "train.strategy=merged",
    "merged-step": "train.strategy=merged train.sync=step",
}

DOCUMENTED = (
    "has no quorum",
    "no client finished training",
)
"""What a run may end with, besides the undisturbed run's weights; see docs/reliability.md."""

_SETTINGS = (
    "model.scratch='{model_type: llama, vocab_size: 259, hidden_size: 16, intermediate_size: 32, "
    "num_hidden_layers: 4, num_attention_heads: 2, num_key_value_heads: 2, pad_token_id: 0, "
    "eos_token_id: 1, bos_token_id: null, tie_word_embeddings: true, "
    "max_position_embeddings: 64}' data.context=32 data.max_examples=24 data.source=files "
    f"data.partitioner=iid train.rounds={ROUNDS} train.local_steps={STEPS} train.batch_size=2 "
    f"train.accumulate={MICROS} train.lr=0.01 link.timeout=8 link.grace=2 federation.quorum=1 "
    "federation.retries=4 federation.round_timeout=60 output.keep_checkpoints=1"
)
RATES = (0.0, 0.05, 0.1, 0.2)
"""Shares of frames that meet a fault."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to happen to one run."""

    seed: int
    policy: str
    rate: float
    """Share of frames that meet a fault."""
    window: int = 4
    codec: str = "fp32"
    dying: tuple[int, int, int] | None = None
    """A client, a round, and how many of its calls to the trunk in it succeed."""
    trunk_dies: int | None = None
    """How many steps the trunk takes before it dies."""

    @property
    def way(self) -> str:
        """How the run is set up, in words."""
        return f"{self.policy}, {self.codec}, window {self.window}"

    def deaths(self) -> str:
        """Who dies, in words."""
        client = f"client {self.dying[0]} in round {self.dying[1]}" if self.dying else ""
        trunk = f"trunk at step {self.trunk_dies}" if self.trunk_dies is not None else ""
        return ", ".join(filter(None, (client, trunk)))


@dataclass(kw_only=True)
class Result:
    """What became of it."""

    verdict: str = "survived"
    """survived, ended (with a documented error) or lost."""
    words: str = ""
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    clients_killed: int = 0
    trunks_killed: int = 0
    reconnects: int = 0


class Killed(BaseException):
    """A process is gone; no code of its own may catch this."""


def draw_plan(seed: int, policy: str, *, window: int = 4, codec: str = "fp32") -> Plan:
    """Draw what is to happen; equal seeds draw alike."""
    chance = random.Random(f"plan {seed}")
    dying = trunk_dies = None
    if chance.random() < 0.35:
        calls = STEPS * (2 * MICROS + 1)  # forwards, backwards and an optimizer step in each
        dying = (chance.randrange(CLIENTS), chance.randint(1, ROUNDS), chance.randrange(calls))
    if chance.random() < 0.35:
        trunk_dies = chance.randrange(1, CLIENTS * ROUNDS * STEPS)
    rate = chance.choice(RATES if dying or trunk_dies is not None else RATES[1:])
    return Plan(
        seed=seed,
        policy=policy,
        rate=rate,
        window=window,
        codec=codec,
        dying=dying,
        trunk_dies=trunk_dies,
    )


def undisturbed(policy: str, folder: Path, codec: str = "fp32") -> dict[str, Tensor]:
    """What a run ends with if nothing happens to it, and each frame waits for the one before it."""
    return _Run(Plan(seed=0, policy=policy, rate=0.0, window=1, codec=codec), folder).tensors()


def run_plan(plan: Plan, folder: Path, wanted: dict[str, Tensor]) -> Result:
    """Run what is planned and judge how it ends: it should be with the tensors `wanted`."""
    started, run = time.monotonic(), _Run(plan, folder)
    result = run.result
    try:
        odd = _differences(run.tensors(), wanted)
        if odd:
            result.verdict, result.words = "lost", f"weights differ in {odd[:3]}"
    except (RuntimeError, ValueError, TrunkError) as error:
        known = next((words for words in DOCUMENTED if words in str(error)), "")
        result.verdict = "ended" if known else "lost"
        result.words = known or f"{type(error).__name__}: {error}"
    result.faults = dict(run.faults())
    result.reconnects = sum(max(0, link.connections - 1) for link in run.links)
    result.seconds = round(time.monotonic() - started, 2)
    return result


def _differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    if found.keys() != wanted.keys():
        return sorted(found.keys() ^ wanted.keys())
    return [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]


class _Grid(InProcessGrid):
    """A grid that a dead trunk no longer asks, and on which a dead client does not answer."""

    def __init__(self, app: ClientApp, trunk_is_dead: Callable[[], bool]) -> None:
        super().__init__(CLIENTS, at_once=True, app=app)
        self._dead = trunk_is_dead

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come."""
        if self._dead():
            raise Killed
        return super().pull_messages(message_ids)

    def _work(self, message: Message) -> None:
        with contextlib.suppress(Killed):
            super()._work(message)


class _Link(GrpcLink):
    """A client's link whose frames meet faults, and in whose use the client may die."""

    def __init__(self, run: _Run, ticket: Any, node_key: bytes, **settings: Any) -> None:
        self.run, self._calls = run, itertools.count()
        name = f"{self.run.plan.seed} {ticket.session} {len(self.run.links)}"
        self.faults = Faults(draw_schedule(name, frames=40, rate=self.run.plan.rate), delay=0.3)
        self.session = ticket.session
        self.run.links.append(self)
        super().__init__(ticket, node_key, interceptors=[self.faults], **settings)

    def compute(self, *args: Any, **settings: Any) -> None:
        """See `GrpcLink`."""
        self._live_on()
        super().compute(*args, **settings)

    def backward(self, *args: Any, **settings: Any) -> None:
        """See `GrpcLink`."""
        self._live_on()
        super().backward(*args, **settings)

    def apply(self, *args: Any) -> None:
        """See `GrpcLink`."""
        self._live_on()
        super().apply(*args)

    def _live_on(self) -> None:
        if self.run.must_die(self.session, next(self._calls)):
            self._over = True
            self._connection.drop()  # as the system does: without a good-bye
            raise Killed


class _Run:
    """A run of the app in this process, with whoever is to die in it."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self._folder = plan, folder
        self.result, self.links = Result(), list[_Link]()
        self._steps, self._dead = 0, False
        self._service: TrunkService | None = None
        self._lock = threading.Lock()
        self._app = make_app(partial(_Link, self))

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors at its end."""
        place = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            with as_flower_runs_it(), _quiet("strategies"), _quiet("flower_app"):
                return self._tensors(_config(place, self.plan))
        finally:
            shutil.rmtree(place)

    def faults(self) -> Counter[str]:
        """How many frames met which fault."""
        return sum((link.faults.met for link in self.links), Counter[str]())

    def must_die(self, session: str, call: int) -> bool:
        """Whether the client of this session dies at this call; it does so once."""
        if self.plan.dying is None or self.result.clients_killed:
            return False
        client, number, last = self.plan.dying
        mine = session.startswith(f"train-{number}.") and session.endswith(f"-{client + 1}")
        if mine and call == last:
            self.result.clients_killed += 1
            return True
        return False

    def _tensors(self, config: Config) -> dict[str, Tensor]:
        recorder = Recorder(config, say=lambda line: None)
        grid = _Grid(self._app, lambda: self._dead)
        try:
            folder = run_experiment(config, grid, recorder, serve=self._service_class())
        except Killed:
            self._bury(recorder, grid)
            folder = self._resume(recorder)
        else:
            recorder.finish(folder)
        assert folder is not None
        return read_tensors(folder)

    def _bury(self, recorder: Recorder, grid: _Grid) -> None:
        """Let go of what a killed process would leave: its file lock, and clients at a loss."""
        for thread in grid.threads:  # clients of the dead trunk end, each in words
            thread.join(30)
            if thread.is_alive():
                raise RuntimeError("a client of a dead trunk did not end within 30 s")
        recorder.fail("killed")
        self._dead = False

    def _resume(self, recorder: Recorder) -> Path | None:
        """Go on where the dead trunk's run was kept, or anew if it died before that."""
        config, point = recorder.config, None
        if (recorder.folder / "checkpoints").is_dir():
            point = take_up(str(recorder.folder))
            config = point.config
        again = Recorder(config, say=lambda line: None, point=point)
        grid = _Grid(self._app, lambda: False)
        folder = run_experiment(config, grid, again, point, serve=self._service_class())
        again.finish(folder)
        return folder

    def _on_step(self) -> None:
        """Count a step of the trunk, and let it die in its time."""
        with self._lock:
            self._steps += 1
            dies = self._steps == self.plan.trunk_dies
            if dies:
                self._dead = True
                self.result.trunks_killed += 1
        if dies:
            assert self._service is not None
            self._service._server.stop(None)  # at once, and nobody is told

    def _service_class(self) -> type[TrunkService]:
        """A service that this run can let die."""
        run = self

        class Service(TrunkService):
            def start(self) -> str:
                run._service = self
                report = self.on_step

                def on_step(step: Any) -> None:
                    report(step)
                    run._on_step()

                self.on_step = on_step
                return super().start()

        return Service


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _config(place: Path, plan: Plan) -> Config:
    texts = place / "texts.jsonl"
    lines = [json.dumps({"text": text[:300]}) for text in list(topics.values())[:48]]
    texts.write_text("\n".join(lines), encoding="utf-8")
    how = (
        f"{POLICIES[plan.policy]} data.path={texts} output.folder={place} "
        f"link.window={plan.window} link.codec={plan.codec}"
    )
    return load_config("demo", f"{_SETTINGS} {how}")
