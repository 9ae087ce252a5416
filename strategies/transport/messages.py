"""The messages transport: steps driven from the Strategy, by nothing but Flower's messages.

For sites that may open no second port. The frames of a session are those of the stream; here they
lie in Flower messages, all micro-batches of a step in one. Each session has a thread of its own on
the server, as a stream has, so that the trunk's policies cannot tell one transport from the other.

A step takes two messages: one brings h2 and takes dL/dh2 back; the other brings dL/dh1 and takes
the next step's h1 back. With `train.sync=step` the step itself, which needs all, is a third.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from conf.schema import Config, LinkConfig
from strategies.engine.engine import TrunkEngine
from strategies.errors import TrunkError
from strategies.mail import LONGEST_PAUSE, never, push, reply_of, unanswered
from strategies.records import ARRAYS, CONFIG, FRAMES, TICKET
from strategies.transport.conversation import Conversation, StepReport
from strategies.transport.plane import Limits
from strategies.transport.tickets import Guest, Ticket

logger = logging.getLogger(__name__)

MAX_DIALOGUES = 256
"""Clients whose frames are worked on at once; each takes a thread when it has some."""

PAUSE = 0.02
"""Seconds between two looks at the mail while something came lately."""


class Lockstep:
    """Serves a `TrunkEngine` through Flower's messages; a `Plane`.

    Parameters
    ----------
    engine : TrunkEngine
        What the sessions drive.
    link : LinkConfig
        Type of activations and gradients in the messages, and how long silence may last.
    """

    address = "Flower's messages"

    def __init__(self, engine: TrunkEngine, link: LinkConfig) -> None:
        self._engine, self._codec = engine, link.codec
        self._patience = link.timeout
        self.on_step: Callable[[StepReport], None] = lambda report: None
        self._guests: dict[str, Guest] = {}
        self._limit = int(link.max_frame_mb * 2**20)
        self._reporting = threading.Lock()
        # One pool for all rounds: every new thread would take memory of its own for good.
        self._pool = ThreadPoolExecutor(MAX_DIALOGUES, thread_name_prefix="graft-dialogue")

    @staticmethod
    def limits(config: Config) -> Limits:
        """A message holds all micro-batches of a step, and clients wait as long as the round."""
        return Limits(turn=config.federation.round_timeout, graphs=0)

    def ticket(self, guest: Guest) -> Ticket:
        """What a client needs to take part: the session's name, with which its state goes."""
        self._guests[guest.key] = guest
        return Ticket(session=guest.key, seed=self._engine.codec_seed(guest.client))

    def open(self, key: str, steps: int) -> Conversation:
        """Open a client's session, unless its round has ended."""
        guest = self._guests.get(key)
        if guest is None:
            raise TrunkError("the session came too late: its round has ended", kind="closed")
        session = self._engine.open(key, client=guest.client, steps=steps, cut=guest.cut)
        self._engine.meter.connected(again=False)
        return Conversation(key, session, self._codec, self._report, limit=self._limit)

    def end_round(self) -> None:
        """Nobody admitted to the round may begin now."""
        self._guests.clear()

    def start(self) -> str:
        """Nothing listens."""
        return self.address

    def stop(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def exchange(
        self,
        grid: Grid,
        messages: Sequence[Message],
        keys: Mapping[int, str],
        *,
        timeout: float,
        enough: Callable[[], bool] = never,
    ) -> Iterator[Message]:
        """Take the cohort through the round; see `Plane.exchange`."""
        dialogues = {
            m.metadata.dst_node_id: Dialogue(self, keys[m.metadata.dst_node_id], m)
            for m in messages
        }
        tour = _Tour(grid, dialogues, self._pool, patience=self._patience, enough=enough)
        return tour.replies(timeout)

    def _report(self, report: StepReport) -> None:
        with self._reporting:
            self.on_step(report)


class Dialogue:
    """One client's session, while its messages come and go.

    Parameters
    ----------
    plane : Lockstep
        Where its session is opened.
    key : str
        The session's name on the server.
    opening : Message
        The message that asks this client; configuration and ticket go with all that follow.
    """

    def __init__(self, plane: Lockstep, key: str, opening: Message) -> None:
        self._plane, self.key, self.opening = plane, key, opening
        self._talk: Conversation | None = None

    def answer(self, reply: Message) -> Message:
        """The next message to this client: what the trunk says to the frames in its reply."""
        frames, steps = _read_frames(reply)
        if self._talk is None:
            self._talk = self._plane.open(self.key, steps)
        answers = [self._talk.answer(frame) for frame in frames]
        content, metadata = self.opening.content, self.opening.metadata
        return Message(
            content=RecordDict(
                {
                    ARRAYS: ArrayRecord(),
                    CONFIG: content[CONFIG],
                    TICKET: content[TICKET],
                    FRAMES: ConfigRecord({"frames": answers}),
                }
            ),
            message_type=metadata.message_type,
            dst_node_id=metadata.dst_node_id,
            ttl=metadata.ttl,
        )

    def close(self) -> None:
        """End the session: nobody waits for it, or for its turn."""
        if self._talk is not None:
            self._talk.session.close()


class _Tour:
    """A cohort's way through a round: who was asked, whose frames are at work, who has ended."""

    def __init__(
        self,
        grid: Grid,
        dialogues: Mapping[int, Dialogue],
        pool: ThreadPoolExecutor,
        *,
        patience: float,
        enough: Callable[[], bool],
    ) -> None:
        self._grid, self._pool, self._patience, self._enough = grid, pool, patience, enough
        self._dialogues = dialogues
        self._under_way = set(dialogues)
        self._waiting: dict[str, Message] = {}
        self._working: dict[int, Future[Message]] = {}
        self._moved = time.monotonic()

    def replies(self, timeout: float) -> Iterator[Message]:
        """One final reply for each client; those that are left at the end are told why."""
        deadline = self._moved + timeout
        try:
            yield from self._send([dialogue.opening for dialogue in self._dialogues.values()])
            pause = PAUSE
            while self._under_way and not self._enough() and time.monotonic() < deadline:
                before = self._moved
                yield from self._move()
                pause = PAUSE if self._moved > before else min(LONGEST_PAUSE, pause * 1.2)
                time.sleep(pause)
            yield from self._give_up(timeout)
        finally:
            for dialogue in self._dialogues.values():
                dialogue.close()

    def _move(self) -> Iterator[Message]:
        """Look at the mail and at the work once."""
        yield from self._read_mail()
        done = [node for node, future in self._working.items() if future.done()]
        following = []
        for node in done:
            self._moved = time.monotonic()
            try:
                following.append(self._working.pop(node).result())
            except Exception as error:  # costs this client the round, nobody else
                if not isinstance(error, TrunkError):
                    logger.exception("session %s failed", self._dialogues[node].key)
                yield from self._refuse(node, f"the trunk refused it: {error}")
        yield from self._send(following)
        if self._waiting and time.monotonic() - self._moved > self._patience:
            yield from self._drop_silent()

    def _send(self, messages: Sequence[Message]) -> Iterator[Message]:
        sent, refused = push(self._grid, messages)
        self._waiting |= sent
        for final in refused:
            yield from self._end(final)

    def _read_mail(self) -> Iterator[Message]:
        mail = list(self._grid.pull_messages(list(self._waiting))) if self._waiting else []
        for reply in mail:
            message = self._waiting.pop(reply.metadata.reply_to_message_id, None)
            if message is None:
                continue
            self._moved, node = time.monotonic(), message.metadata.dst_node_id
            reply = reply_of(message, reply)
            if _goes_on(reply):
                self._working[node] = self._pool.submit(self._dialogues[node].answer, reply)
            else:
                yield from self._end(reply)

    def _drop_silent(self) -> Iterator[Message]:
        """Nobody moves: those who wait for others are not among those asked."""
        for message in self._waiting.values():
            reason = f"no answer within link.timeout={self._patience:g} s"
            yield from self._end(unanswered(message, reason))
        self._waiting.clear()
        self._moved = time.monotonic()

    def _give_up(self, timeout: float) -> Iterator[Message]:
        """Say of those who are left why nobody waits for them."""
        asked = len(self._dialogues)
        reason = f"no answer within federation.round_timeout={timeout:g} s"
        if self._enough():
            reason = f"not needed: {asked - len(self._under_way)} of {asked} answered"
        for node in sorted(self._under_way):
            yield from self._refuse(node, reason)

    def _refuse(self, node: int, reason: str) -> Iterator[Message]:
        yield from self._end(unanswered(self._dialogues[node].opening, reason))

    def _end(self, final: Message) -> Iterator[Message]:
        """Yield a client's last reply; nobody waits for it any more."""
        node = final.metadata.src_node_id
        if node in self._under_way:
            self._under_way.remove(node)
            self._dialogues[node].close()
            yield final


def _read_frames(reply: Message) -> tuple[list[bytes], int]:
    """The frames in a client's reply, and the steps that it plans; `TrunkError` if it has none."""
    record = reply.content.config_records[FRAMES]
    frames, steps = record.get("frames"), record.get("steps")
    if not isinstance(frames, list) or not all(isinstance(frame, bytes) for frame in frames):
        raise TrunkError("frames must be a list of bytes")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TrunkError(f"steps must be a whole number, got {steps!r:.20}")
    return [frame for frame in frames if isinstance(frame, bytes)], steps


def _goes_on(reply: Message) -> bool:
    """Whether a reply asks for more; one without frames is the client's last."""
    return not reply.has_error() and FRAMES in reply.content.config_records
