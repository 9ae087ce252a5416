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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from conf.schema import LinkConfig
from strategies.engine.engine import TrunkEngine
from strategies.errors import TrunkError
from strategies.mail import LONGEST_PAUSE, never, push, unanswered
from strategies.records import ARRAYS, CONFIG, FRAMES, TICKET
from strategies.transport.conversation import Conversation, StepReport
from strategies.transport.tickets import Guest, Ticket

logger = logging.getLogger(__name__)

MAX_SEATS = 256
"""Clients whose frames are worked on at once; each takes a thread when it has some."""

PAUSE = 0.02
"""Seconds between two looks at the mail while something came lately."""


class Seat:
    """One client's session, while its messages come and go.

    Parameters
    ----------
    lockstep : Lockstep
        Where it sits.
    key : str
        The session's name on the server.
    opening : Message
        The message that asked this client; configuration and ticket go with all that follow.
    """

    def __init__(self, lockstep: Lockstep, key: str, opening: Message) -> None:
        self._lockstep, self._key, self._opening = lockstep, key, opening
        self._talk: Conversation | None = None

    def answer(self, reply: Message) -> Message:
        """The next message to this client: what the trunk says to the frames in its reply."""
        record = reply.content.config_records[FRAMES]
        frames = record["frames"]
        if not isinstance(frames, list) or not all(isinstance(f, bytes) for f in frames):
            raise TrunkError("frames must be a list of bytes")
        if self._talk is None:
            self._talk = self._lockstep.open(self._key, int(record["steps"]))  # type: ignore[arg-type]
        answers = [self._talk.answer(frame) for frame in frames if isinstance(frame, bytes)]
        content = self._opening.content
        return Message(
            content=RecordDict(
                {
                    ARRAYS: ArrayRecord(),
                    CONFIG: content[CONFIG],
                    TICKET: content[TICKET],
                    FRAMES: ConfigRecord({"frames": answers}),
                }
            ),
            message_type=self._opening.metadata.message_type,
            dst_node_id=self._opening.metadata.dst_node_id,
        )

    def close(self) -> None:
        """End the session: nobody waits for it, or for its turn."""
        if self._talk is not None:
            self._talk.session.close()


class Lockstep:
    """Serves a `TrunkEngine` through Flower's messages.

    Parameters
    ----------
    engine : TrunkEngine
        What the sessions drive.
    link : LinkConfig
        Type of activations and gradients in the messages, and how long silence may last.
    """

    address = "Flower's messages"

    def __init__(self, engine: TrunkEngine, link: LinkConfig) -> None:
        self._engine, self._codec = engine, link.dtype
        self._patience = link.timeout
        self.on_step: Callable[[StepReport], None] = lambda report: None
        self._guests: dict[str, Guest] = {}
        self._limit = int(link.max_frame_mb * 2**20)
        self._reporting = threading.Lock()
        # One pool for all rounds: every new thread would take memory of its own for good.
        self._pool = ThreadPoolExecutor(MAX_SEATS, thread_name_prefix="graft-seat")

    def ticket(self, guest: Guest) -> Ticket:
        """What a client needs to take part: the session's name, with which its state goes."""
        self._guests[guest.key] = guest
        return Ticket(session=guest.key)

    def open(self, key: str, steps: int) -> Conversation:
        """Open a client's session, unless its round has ended."""
        guest = self._guests.get(key)
        if guest is None:
            raise TrunkError("the session came too late: its round has ended", kind="closed")
        session = self._engine.open(key, client=guest.client, steps=steps, cut=guest.cut)
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
        openings: Sequence[Message],
        keys: dict[int, str],
        *,
        timeout: float,
        enough: Callable[[], bool] = never,
    ) -> Iterator[Message]:
        """Take the cohort through the round.

        Parameters
        ----------
        grid : Grid
            Flower's.
        openings : sequence of Message
            The round's first message to each client.
        keys : dict
            The session's name for each node.
        timeout : float
            Seconds for the whole round (`federation.round_timeout`).
        enough : callable
            Whether the answers so far suffice.

        Yields
        ------
        Message
            One final reply for each opening: the client's, or an error that says why not.
        """
        deadline = time.monotonic() + timeout
        seats = {
            m.metadata.dst_node_id: Seat(self, keys[m.metadata.dst_node_id], m) for m in openings
        }
        open_to = {m.metadata.dst_node_id: m for m in openings}
        working: dict[int, Future[Message]] = {}
        waiting, refused = push(grid, openings)
        try:
            for final in refused:
                yield from self._finish(final, seats, open_to)
            quiet, last = PAUSE, time.monotonic()
            while open_to and not enough() and time.monotonic() < deadline:
                busy = False
                for reply in list(grid.pull_messages(list(waiting))) if waiting else []:
                    message = waiting.pop(reply.metadata.reply_to_message_id, None)
                    if message is None:
                        continue
                    busy, node = True, message.metadata.dst_node_id
                    if _goes_on(reply):
                        working[node] = self._pool.submit(seats[node].answer, reply)
                    else:
                        yield from self._finish(_under(message, reply), seats, open_to)
                done = {node: future for node, future in working.items() if future.done()}
                following = []
                for node, future in done.items():
                    busy = True
                    del working[node]
                    try:
                        following.append(future.result())
                    except TrunkError as error:
                        final = unanswered(open_to[node], f"the trunk refused it: {error}")
                        yield from self._finish(final, seats, open_to)
                    except Exception as error:  # costs this client the round, nobody else
                        logger.exception("session %s failed", keys[node])
                        final = unanswered(open_to[node], f"the trunk refused it: {error}")
                        yield from self._finish(final, seats, open_to)
                sent, refused = push(grid, following)
                waiting |= sent
                for final in refused:
                    yield from self._finish(final, seats, open_to)
                now = time.monotonic()
                last = now if busy else last
                if waiting and now - last > self._patience:
                    # Nobody moves: those who wait for others are not among those asked.
                    for message in waiting.values():
                        reason = f"no answer within link.timeout={self._patience:g} s"
                        yield from self._finish(unanswered(message, reason), seats, open_to)
                    waiting.clear()
                    last = now
                quiet = PAUSE if busy else min(LONGEST_PAUSE, quiet * 1.2)
                time.sleep(quiet)
            for node, message in open_to.items():
                reason = f"no answer within federation.round_timeout={timeout:g} s"
                if enough():
                    reason = (
                        f"not needed: {len(openings) - len(open_to)} of {len(openings)} answered"
                    )
                seats[node].close()
                yield unanswered(message, reason)
        finally:
            for seat in seats.values():
                seat.close()

    def _finish(
        self, final: Message, seats: dict[int, Seat], open_to: dict[int, Message]
    ) -> Iterator[Message]:
        """Yield a client's last reply; nobody waits for it any more."""
        node = final.metadata.src_node_id
        if open_to.pop(node, None) is None:
            return
        seats[node].close()
        yield final

    def _report(self, report: StepReport) -> None:
        with self._reporting:
            self.on_step(report)


def _goes_on(reply: Message) -> bool:
    """Whether a reply asks for more; one without frames is the client's last."""
    return not reply.has_error() and FRAMES in reply.content.config_records


def _under(message: Message, reply: Message) -> Message:
    """The reply under its node's id: Flower's word that a node is lost bears the server's."""
    return Message(reply.error, reply_to=message) if reply.has_error() else reply
