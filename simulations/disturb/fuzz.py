"""Random, damaged and hostile frames against the decoder and whole sessions.

``graft fuzz`` prints what `fuzz` finds. Every input must be answered, or refused by a `TrunkError`
in words, soon, and within bounded memory; anything else is a crash, and is reported with the seed
and the number that bring it back.
"""

from __future__ import annotations

import faulthandler
import math
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from simulations.disturb.generation import TARGET, Generations
from simulations.disturb.inputs import LIMIT, Inputs
from simulations.disturb.sessions import OFTEN, Sessions, Wrong, check_words
from strategies.errors import TrunkError
from strategies.memory import peak_bytes
from strategies.transport import trunk_pb2 as pb
from strategies.transport.codec.registry import codecs, find_codec
from strategies.transport.codec.tensors import decode_mask, shape_of
from strategies.transport.frames import read_client_frame, read_server_frame, refuse_failure

SEQUENCE = 20
"""Inputs that one sequence draws; sequences take turns: the decoder's, a session's."""

DEADLINE = 2.0
"""Seconds that one input may take."""

HANGS = 60.0
"""Seconds after which an input is taken for one that never ends."""

MOST_MEMORY = 64 * LIMIT
"""Bytes by which one input may raise the peak of this process."""

MOST_CRASHES = 20
"""After so many the rest is not tried."""

GENERATIONS = 4
"""How often sessions generate, as one kind of training session does."""

HIDDEN = 8
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Crash:
    """An input that was not answered and not refused as it should be."""

    seed: int
    input: int
    target: str
    what: str


@dataclass
class Report:
    """What came of the inputs so far."""

    inputs: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    crashes: list[Crash] = field(default_factory=list)
    slowest_seconds: float = 0.0
    slowest_input: int = -1
    longest_words: int = 0


def fuzz(
    inputs: int = 100_000,
    seed: int = 0,
    only: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Send so many inputs, half of them to the decoder and half to sessions.

    Parameters
    ----------
    inputs : int
        How many.
    seed : int
        Equal seeds send alike.
    only : int, optional
        Send nothing but the sequence in which this input lies, as a crash names it.
    say : callable
        Takes a line on the progress.

    Returns
    -------
    dict
        ``inputs``; how many were ``answered`` and ``refused``, by what; ``crashes``, a list;
        the ``slowest_seconds`` of an input; ``rss_growth_mib`` and ``peak_growth_mib`` of this
        process since the first hundredth of the inputs; and ``seconds``.
    """
    torch.set_num_threads(1)
    report, started = Report(), time.perf_counter()
    numbers = range(0, inputs, SEQUENCE)
    if only is not None:
        numbers = range(only // SEQUENCE * SEQUENCE, only + 1, SEQUENCE)
    warm = len(numbers) // 100
    first = peak = 0
    with _watched(report, seed) as watch:
        for index, number in enumerate(numbers):
            if index == warm:  # libraries have loaded what they load at the first use
                _forget_peak()
                first, peak = psutil.Process().memory_info().rss, peak_bytes()
            _sequence(seed, number, min(SEQUENCE, inputs - number), report, watch)
            if len(report.crashes) >= MOST_CRASHES:
                break
            if index % 500 == 499:
                say(f"{report.inputs:,} inputs, {len(report.crashes)} crashes")
    return {
        "fuzz": "frames and sessions",
        "seed": seed,
        "inputs": report.inputs,
        "seconds": round(time.perf_counter() - started, 1),
        "crashes": [asdict(crash) for crash in report.crashes],
        "answered": dict(report.answered.most_common()),
        "refused": dict(report.refused.most_common()),
        "targets": dict(report.targets.most_common()),
        "longest_words": report.longest_words,
        "slowest_seconds": round(report.slowest_seconds, 4),
        "slowest_input": report.slowest_input,
        "largest_frame_mib": LIMIT / _MIB,
        "rss_growth_mib": round((psutil.Process().memory_info().rss - first) / _MIB, 1),
        "peak_growth_mib": round((peak_bytes() - peak) / _MIB, 1),
    }


class _Watch:
    """Which input is at work since when."""

    number = -1
    since: float | None = None


def _sequence(seed: int, first: int, count: int, report: Report, watch: _Watch) -> None:
    """Send the inputs of one sequence, which depends on the seed and its first number alone."""
    chance = random.Random(f"{seed}-{first}")
    try:
        if first // SEQUENCE % 2:
            kind = chance.choice([*OFTEN, *[TARGET] * GENERATIONS])
            sessions = Generations(chance) if kind == TARGET else Sessions(kind, chance)
            draw, put, end = sessions.draw, sessions.put, sessions.end
        else:
            kind, decoder = "decoder", Decoder(chance)
            draw, put, end = decoder.draw, decoder.put, lambda: None
        for number in range(first, first + count):
            watch.number = number
            report.inputs += 1
            report.targets[kind] += 1
            _one(draw(), put, number, report, watch)
        end()
    except Exception as error:  # noqa: BLE001 - a fuzzer is here to see all of them
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        what = f"{type(error).__name__}: {str(error)[:500]} ({where})"
        report.crashes.append(Crash(seed=seed, input=watch.number, target=kind, what=what))


def _one(
    raw: bytes, put: Callable[[bytes], str], number: int, report: Report, watch: _Watch
) -> None:
    peak = peak_bytes()
    watch.since = time.perf_counter()
    try:
        report.answered[put(raw)] += 1
    except TrunkError as error:
        check_words(str(error))
        report.longest_words = max(report.longest_words, len(str(error)))
        report.refused[error.kind] += 1
    finally:
        seconds, watch.since = time.perf_counter() - watch.since, None
    if seconds > report.slowest_seconds:
        report.slowest_seconds, report.slowest_input = seconds, number
    if seconds > DEADLINE:
        raise Wrong(f"it took {seconds:.3g} s")
    if (grown := peak_bytes() - peak) > MOST_MEMORY:
        raise Wrong(f"a frame of {len(raw)} bytes took {grown / _MIB:.4g} MiB")


class Decoder:
    """The decoder of both directions, on its own."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        codec, gradient = chance.choice(list(codecs())), chance.random() < 0.5
        self._inputs = Inputs(chance, hidden=HIDDEN, codec=codec, gradient=gradient)
        # Another than the one that encodes: some of a session's tensors never come here.
        self._codec = find_codec(codec)(gradient=gradient)
        self._compresses = self._codec.sizes(2**16, 2**16)[0] < 2**28
        self._last = b""

    def draw(self) -> bytes:
        """The next input."""
        chance, inputs = self._chance, self._inputs
        way = chance.random()
        if way < 0.2:
            return inputs.noise()
        if way < 0.45:
            return inputs.hostile(chance.randrange(3), chance.randrange(3))
        if way < 0.6:
            return inputs.hostile_answer()
        right = inputs.honest_answer() if way < 0.7 else inputs.compute(0, 0)
        self._last, last = right, self._last
        return right if way > 0.95 else inputs.damaged(right, last)

    def put(self, raw: bytes) -> str:
        """Read a frame in both directions, and each tensor in it; returns what it was.

        Raises
        ------
        TrunkError
            If neither direction can read it, or a tensor of it.
        """
        refusals, body = [], ""
        for read in (read_client_frame, lambda raw: refuse_failure(read_server_frame(raw))):
            try:
                frame = read(raw)
                body = frame.kind or "nothing"
                for tensor in tensors(frame.head):
                    shape = shape_of(tensor, "a tensor")
                    if self._compresses and math.prod(shape) > LIMIT:  # a session knows its shapes
                        raise TrunkError(f"a tensor of shape {shape}", kind="shape")
                    mask_BT = decode_mask(masks(frame.head), shape[:2])
                    self._codec.decode(tensor, mask_BT, frame.payload, "a tensor")
            except TrunkError as error:
                check_words(str(error))
                refusals.append(error)
        if len(refusals) == 2:
            raise refusals[0]
        return body


def tensors(frame: pb.ClientFrame | pb.ServerFrame) -> Iterator[pb.Tensor]:
    """All tensors in a frame, one after another."""
    stack: list[Any] = [frame]
    while stack:
        for described, value in stack.pop().ListFields():
            if described.message_type is None or described.message_type.GetOptions().map_entry:
                continue
            for each in value if described.is_repeated else (value,):
                if isinstance(each, pb.Tensor):
                    yield each
                else:
                    stack.append(each)


def masks(frame: pb.ClientFrame | pb.ServerFrame) -> bytes:
    """The mask in a frame, if it may have one."""
    body = frame.WhichOneof("body")
    return getattr(getattr(frame, body), "mask", b"") if body else b""


@contextmanager
def _watched(report: Report, seed: int) -> Iterator[_Watch]:
    """End the process, naming the input, if one never ends."""
    watch, over = _Watch(), threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            since = watch.since
            if since is not None and time.perf_counter() - since > HANGS:
                stream = sys.__stderr__ or sys.stderr
                print(f"input {watch.number} of seed {seed} hangs", file=stream, flush=True)
                faulthandler.dump_traceback(stream)
                os._exit(1)

    thread = threading.Thread(target=look, daemon=True, name="graft-fuzz")
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _forget_peak() -> None:
    """Let the peak begin anew where the system can (Linux), or large first inputs hide others."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
