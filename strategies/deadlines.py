"""How long each side waits for the other: everything follows from `link.timeout` and `link.grace`.

The order is what counts (and is tested): a question is asked again long before its client gives up;
whoever waits for the cohort does so for less than a turn; a client that fell silent has given its
turn back before others give up waiting for theirs; and they hear so before their own deadline.
"""

from __future__ import annotations

REPEAT_SHARE, IDLE_SHARE, TURN_SHARE = 1 / 8, 1 / 2, 3 / 4
"""Of `link.timeout`, which a client waits for a reply."""

GATHER_SHARE = 1 / 2
"""Of the time that a turn may take to come."""

KEEPALIVE_SHARE = 1 / 6
"""Of `link.grace`."""

SHORTEST_KEEPALIVE = 1.0


def repeat(timeout: float) -> float:
    """Seconds without an answer after which a client asks again."""
    return timeout * REPEAT_SHARE


def silence(timeout: float) -> float:
    """Seconds that the trunk waits for a client's next frame."""
    return timeout * IDLE_SHARE


def turn(timeout: float) -> float:
    """Seconds that a session waits for its turn at a shared trunk."""
    return timeout * TURN_SHARE


def gather(turn: float) -> float:
    """Seconds that a round's first step waits for the whole cohort."""
    return turn * GATHER_SHARE


def keepalive(grace: float) -> float:
    """Seconds after which a quiet connection is tried, and that it may take to answer: one that
    leads nowhere is known for broken well within the grace."""
    return max(SHORTEST_KEEPALIVE, grace * KEEPALIVE_SHARE)
