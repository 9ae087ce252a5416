"""Waiting for replies: one for every message, the client's own or the reason why there is none.

Flower's `send_and_receive` returns when all have answered or time is up. Here replies come one by
one, so that a round can end with the first answers that suffice, and a client whose stream to the
trunk broke is given up before the round's deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import DEFAULT_TTL, Error, Message
from flwr.serverapp import Grid

FIRST_PAUSE, LONGEST_PAUSE, PAUSE_SHARE = 0.1, 1.0, 0.01
"""Seconds between two looks at the mail: this share of the time waited so far, within bounds."""


SPARE = 600.0
"""Seconds that a message outlives those who wait for its reply, so that clocks may differ."""


@dataclass(frozen=True, kw_only=True)
class LostStream:
    """A session that has no stream and had no good-bye."""

    since: float
    """When it lost its stream, by `time.monotonic`."""
    done: int
    """Optimizer steps that were applied."""
    steps: int
    """Optimizer steps that were planned."""


def lifetime(timeout: float) -> float:
    """Seconds for which Flower keeps a message whose reply is waited for so long."""
    return max(DEFAULT_TTL, timeout + SPARE)


def never() -> bool:
    """Every answer is needed."""
    return False


def unbroken(node: int) -> LostStream | None:
    """No stream belongs to these messages."""
    return None


def push(grid: Grid, messages: Sequence[Message]) -> tuple[dict[str, Message], list[Message]]:
    """Send messages.

    Returns
    -------
    waiting : dict
        The messages that Flower took, by message id; `receive` takes out what is answered.
    refused : list
        An error reply for each message that Flower did not take.
    """
    taken = set(grid.push_messages(messages)) if messages else set()
    waiting = {m.metadata.message_id: m for m in messages if m.metadata.message_id in taken}
    refused = [m for m in messages if m.metadata.message_id not in waiting]
    return waiting, [unanswered(m, "Flower took no message for it") for m in refused]


def receive(
    grid: Grid,
    waiting: dict[str, Message],
    *,
    timeout: float,
    enough: Callable[[], bool] = never,
    lost: Callable[[int], bool] = lambda node: False,
) -> Iterator[Message]:
    """Yield replies as they come, until all are here, time is up, or waiting on is no use.

    Parameters
    ----------
    grid : Grid
        Flower's.
    waiting : dict
        What `push` returned. An answered message is taken out; what is left had no answer.
    timeout : float
        Seconds from now.
    enough : callable
        Asked after every reply and every look at the mail; true ends the wait.
    lost : callable
        Whether a node will not answer any more. If all that are left will not, the wait ends.

    Notes
    -----
    A reply belongs to the message whose id it carries, whoever sent it: the late reply to an
    earlier round's message is nobody's.
    """
    started = time.monotonic()
    while waiting:
        for reply in list(grid.pull_messages(list(waiting))):
            message = waiting.pop(reply.metadata.reply_to_message_id, None)
            if message is None:
                continue
            yield reply_of(message, reply)
            if enough():
                return
        waited = time.monotonic() - started
        done = enough() or all(lost(m.metadata.dst_node_id) for m in waiting.values())
        if done or waited >= timeout:
            return
        pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, PAUSE_SHARE * waited))
        time.sleep(min(pause, timeout - waited))


def exchange(
    grid: Grid,
    messages: Sequence[Message],
    *,
    timeout: float,
    enough: Callable[[], bool] = never,
    broken: Callable[[int], LostStream | None] = unbroken,
    lost_after: float = 0.0,
) -> Iterator[Message]:
    """Send messages and yield one reply for each: the client's, or an error that says why not.

    Parameters
    ----------
    grid : Grid
        Flower's.
    messages : sequence of Message
        At most one for a node.
    timeout : float
        Seconds after which nobody is waited for any longer (`federation.round_timeout`).
    enough : callable
        As for `receive`; those who have not answered then are not needed.
    broken : callable
        What became of a node's stream to the trunk, if it broke.
    lost_after : float
        Seconds after its stream broke at which a silent node is lost.
    """

    def is_lost(node: int) -> bool:
        gone = broken(node)
        return gone is not None and time.monotonic() - gone.since >= lost_after

    waiting, refused = push(grid, messages)
    yield from refused
    yield from receive(grid, waiting, timeout=timeout, enough=enough, lost=is_lost)
    answered = len(messages) - len(waiting) - len(refused)
    for message in waiting.values():
        node = message.metadata.dst_node_id
        if enough() and not is_lost(node):
            reason = f"not needed: {answered} of {len(messages)} answered first"
        elif gone := broken(node):
            silence = time.monotonic() - gone.since
            reason = (
                f"its stream broke after step {gone.done} of {gone.steps} and no answer came "
                f"within {silence:.3g} s"
            )
        else:
            reason = f"no answer within federation.round_timeout={timeout:g} s"
        yield unanswered(message, reason)


def unanswered(message: Message, reason: str) -> Message:
    """An error in place of the reply to a message."""
    return Message(Error(code=0, reason=reason), reply_to=message)


def reply_of(message: Message, reply: Message) -> Message:
    """The reply under its node's id: Flower's word that a node is lost bears the server's."""
    if reply.has_error():
        return Message(reply.error, reply_to=message)
    if reply.metadata.src_node_id != message.metadata.dst_node_id:
        return unanswered(message, f"node {reply.metadata.src_node_id} answered in its place")
    return reply
