"""Replies that may be asked for again, as the bytes that were sent."""

from __future__ import annotations

from strategies.engine.engine import MAX_GRAPHS
from strategies.engine.session import Session
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import checksum_of

UNSEEN = 2
"""Replies that a client may not have seen, for each micro-batch that may be under way: its
activations and its gradient. One more is that to the step's end."""


class KeptReplies:
    """The encoded replies of one session that its client has not seen, by their numbers.

    So frames are served strictly in order, the engine computes once, and a codec may have a state,
    or draw random numbers. All that is kept counts as in flight.

    Parameters
    ----------
    session : Session
        Whose replies they are.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._due = 1
        self._kept: dict[int, tuple[bytes, bytes]] = {}

    def again(self, frame: pb.ClientFrame, raw: bytes) -> bytes | None:
        """The reply to a frame that came before, byte for byte; None if it is the one due.

        Raises
        ------
        TrunkError
            Of kind `gap`, if one before it has not come; `stale`, if the client has seen the reply;
            `missing`, for a gradient that is not there; of another, if it cannot be.
        """
        body = frame.WhichOneof("body")
        if body == "close":
            return None
        self._session.check_open()
        number, kept = frame.number, self._kept.get(frame.number)
        if body == "get_gradients":
            if kept is None:
                raise TrunkError(
                    f"no gradient is kept of frame {number}; frame {self._due} is due",
                    kind="missing",
                )
            return kept[1]
        if not number:
            raise TrunkError(f"a frame of kind '{body}' came without a number", kind="order")
        if number > self._due:
            raise TrunkError(f"frame {number} came, frame {self._due} is due", kind="gap")
        if number == self._due:
            self._forget(frame.seen)
            return None
        if kept is None:
            raise TrunkError(
                f"frame {number} came again, and its answer was seen; frame {self._due} is due",
                kind="stale",
            )
        if kept[0] != checksum_of(raw):
            raise TrunkError(
                f"frame {number} came again with other bytes: a client sends again what it has "
                "sent before",
                kind="order",
            )
        return kept[1]

    def keep(self, frame: pb.ClientFrame, raw: bytes, reply: bytes) -> None:
        """Keep a reply; `TrunkError` if more is in flight than may be."""
        if frame.WhichOneof("body") == "close":
            self._kept.clear()  # the session has given back all that it held
            return
        if len(self._kept) > (most := UNSEEN * max(MAX_GRAPHS, self._session.most_under_way)):
            raise TrunkError(
                f"frame {frame.number} came and {len(self._kept)} answers before it were not seen; "
                f"at most {most} may be",
                kind="order",
            )
        self._session.hold(len(reply))
        self._kept[self._due] = checksum_of(raw), reply
        self._due += 1

    def _forget(self, seen: int) -> None:
        """Drop what the client will not ask for again."""
        for number in [each for each in self._kept if each <= seen]:
            self._session.release(len(self._kept.pop(number)[1]))
