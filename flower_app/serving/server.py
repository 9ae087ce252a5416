"""A server of trunks that generate: what is served, who may come, and how it ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.schema import LinkConfig
from flower_app.build import set_threads
from flower_app.serving.access import (
    Keys,
    ServedModel,
    admit,
    own_certificate,
    read_keys,
    write_files,
)
from flower_app.serving.health import Health
from flower_app.serving.source import Served, find_served, load_trunks
from models import Cut
from strategies.engine.meter import SILENT, Meter
from strategies.generation.engine import GenerationEngine
from strategies.generation.memory import Limits, Memory
from strategies.transport.codec.registry import crossings
from strategies.transport.stream.bind import host_of, is_secure
from strategies.transport.stream.generation import GenerationService, Offer, Policy

logger = logging.getLogger(__name__)

TOLD_SECONDS = 1.0
"""How long sessions that were ended may take to ask why."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and to whom."""

    sources: tuple[tuple[str, str], ...]
    """Name (empty: the source's own) and source of each model."""
    access: Path
    """Where the server's keys and its clients' access files are."""
    link: LinkConfig = field(default_factory=LinkConfig)
    cut: Cut | None = None
    clients: int = 1
    days: float = 0.0
    """For which a new access file is good; 0: for ever."""
    kv_mb: float = 1024.0
    session_kv_mb: float = 512.0
    policy: Policy = field(default_factory=Policy)
    metrics: tuple[str, int] = ("127.0.0.1", 0)
    """Address and port for Prometheus; port 0: none."""
    threads: int = 0
    dtype: str = "fp32"
    """That the trunks are computed in."""


class Server:
    """Trunks behind one port.

    Parameters
    ----------
    serving : Serving
        What is served, and to whom.
    meter : Meter
        Told of the work.

    Raises
    ------
    ValueError
        In words, if something is not there, or the address is not free.
    """

    def __init__(self, serving: Serving, meter: Meter = SILENT) -> None:
        crossings(serving.link.codec, 0)  # before anything is loaded
        self.serving = serving
        self.models = _named(serving)
        limits = Limits(total_mb=serving.kv_mb, session_mb=serving.session_kv_mb)
        self.memory = Memory(limits)
        self.engines = [
            GenerationEngine(part, limits, meter=meter, threads=serving.threads, memory=self.memory)
            for part in load_trunks(list(self.models.values()), dtype=serving.dtype)
        ]
        offers = {
            name: Offer(engine=engine, fingerprint=served.fingerprint)
            for (name, served), engine in zip(self.models.items(), self.engines, strict=True)
        }
        folder = serving.access
        keys, private = admit(folder, read_keys(folder), serving.clients, serving.days)
        self.service = GenerationService(
            offers,
            keys.clients,
            _certified(serving.link, folder),
            key=keys.private,
            policy=serving.policy,
            meter=meter,
        )
        self.keys: Keys = keys
        self.files = self._write(private)
        self._health = Health()
        self.service.add([self._health.handler()])

    def _write(self, private: dict[str, bytes]) -> list[Path]:
        models = [
            ServedModel(
                name=name,
                description=served.description,
                fingerprint=served.fingerprint,
                cut=served.cut,
                hidden_size=served.hidden_size,
            )
            for name, served in self.models.items()
        ]
        return write_files(
            self.serving.access,
            self.keys,
            private,
            address=self.service.address,
            certificate=self.service.certificate,
            models=models,
        )

    def start(self) -> str:
        """Accept sessions; returns the address."""
        address = self.service.start()
        self._health.serving = True
        return address

    def stop(self, grace: float = 0.0, hurry: Callable[[], bool] = lambda: False) -> None:
        """Let open sessions end within `grace` seconds, tell the others, and stop."""
        self._health.serving = False
        if self.service.drain(grace, hurry):
            deadline = time.monotonic() + TOLD_SECONDS
            while time.monotonic() < deadline and not hurry():
                time.sleep(0.05)
        self.service.stop()
        for engine in self.engines:
            engine.stop()

    def words(self) -> Iterator[str]:
        """What is served, line by line."""
        serving, policy = self.serving, self.serving.policy
        for (name, served), engine in zip(self.models.items(), self.engines, strict=True):
            yield f"model    {name}: {served.description}; trunk of {_blocks(served)}"
            if engine.one_by_one:
                yield f"         its tokens go one by one: {engine.one_by_one}"
        secure = "TLS" if self.service.certificate else "no TLS: this machine only"
        yield f"address  {self.service.address} ({secure}), tensors in {serving.link.codec_words}"
        written = {path.stem: path for path in self.files}
        for name in self.keys.clients:
            yield f"access   {written.get(name) or f'{name}: its file was handed out'}"
        yield (
            f"limits   {policy.sessions} sessions; keys and values {serving.kv_mb:g} MiB, of one "
            f"session {serving.session_kv_mb:g} MiB; ended after {policy.idle:g} s without a frame"
        )


def _named(serving: Serving) -> dict[str, Served]:
    found: dict[str, Served] = {}
    for name, source in serving.sources:
        served = find_served(source, serving.cut)
        if (name or served.name) in found:
            raise ValueError(
                f"two models would be called '{name or served.name}': name them, --name NAME=SOURCE"
            )
        found[name or served.name] = served
    if not found:
        raise ValueError("nothing is to be served: name a run or a model")
    return found


def _blocks(served: Served) -> str:
    cut = served.cut
    return (
        f"{served.num_blocks - cut.bottom - cut.top} blocks, clients hold {cut.bottom} below and "
        f"{cut.top} above"
    )


def _certified(link: LinkConfig, folder: Path) -> LinkConfig:
    """With TLS and no certificate of the operator's, one that stays from start to start."""
    if not is_secure(link) or link.certificate:
        return link
    certificate, key = own_certificate(folder, host_of(link))
    return replace(link, certificate=str(certificate), key=str(key))


@contextmanager
def running(serving: Serving, say: Callable[[str], None]) -> Iterator[Server]:
    """A server that serves, with its metrics if they are asked for."""
    set_threads(serving.threads)
    if not serving.metrics[1]:
        server = Server(serving)
        server.start()
        yield server
        return
    from flower_app.metrics.generation import GenerationMetrics
    from flower_app.metrics.serve import new_registry, served

    registry = new_registry()
    metrics = GenerationMetrics(registry)
    server = Server(serving, metrics)
    metrics.attach_server(server.service, server.engines, server.memory)
    with served(registry, *serving.metrics) as where:
        say(f"metrics  {where}")
        server.start()
        yield server


def serve(
    serving: Serving,
    *,
    grace: float,
    asked: Callable[[], int],
    say: Callable[[str], None],
) -> None:
    """Serve until somebody asks for the end.

    Parameters
    ----------
    serving : Serving
        What is served.
    grace : float
        Seconds that open sessions have to end.
    asked : callable
        How often the end was asked for; twice: at once.
    say : callable
        Takes a line.
    """
    with running(serving, say) as server:
        for line in server.words():
            say(line)
        say("ready: Ctrl-C ends it")
        wait = threading.Event()
        while not asked():
            wait.wait(0.1)
        open_ = server.service.sessions()
        say(f"stopping: {open_} sessions are open, they have {grace:g} s" if open_ else "stopping")
        server.stop(grace, lambda: asked() > 1)
        say("stopped")


def sources_of(plain: Sequence[str], named: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Name and source of each model that a command line gives, ``NAME=SOURCE`` or ``SOURCE``."""
    found = [("", source) for source in plain]
    for text in named:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise ValueError(f"--name takes NAME=SOURCE, got {text!r}")
        found.append((name, source))
    return tuple(found)
