"""Replies that may be asked for again, as the bytes that were sent."""

from __future__ import annotations

from strategies.engine.session import Session
from strategies.errors import TrunkError
from strategies.transport import trunk_pb2 as pb
from strategies.transport.frames import checksum_of

_Place = tuple[str, int, int]
"""What was asked: the frame's body, its step and its micro-batch."""


class KeptReplies:
    """The encoded replies of one session's step, until the step is over.

    So the engine computes once, and a codec may have a state, or draw random numbers. At most one
    reply is kept for a micro-batch, for the client that sent its gradient has seen its activations;
    the reply to a step's end is kept until the next one's. All of it counts as in flight.

    Parameters
    ----------
    session : Session
        Whose replies they are.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kept: dict[_Place, tuple[bytes, bytes]] = {}

    def again(self, frame: pb.ClientFrame, raw: bytes) -> bytes | None:
        """The reply to a frame that came before, byte for byte; None if it did not.

        Raises
        ------
        TrunkError
            Of kind `missing`, for a gradient that is not there; of another, once it is closed.
        """
        body = frame.WhichOneof("body")
        if body == "close":
            return None
        self._session.check_open()
        if body != "get_gradients":
            kept = self._kept.get(_place(frame))
            return kept[1] if kept is not None and kept[0] == checksum_of(raw) else None
        asked = frame.get_gradients
        if (place := ("backward", asked.step, asked.micro)) in self._kept:
            return self._kept[place][1]
        raise TrunkError(
            f"no gradient of step {asked.step}, micro-batch {asked.micro} is kept: step "
            f"{self._session.applied} is the current one",
            kind="missing",
        )

    def keep(self, frame: pb.ClientFrame, raw: bytes, reply: bytes) -> None:
        """Keep a reply; `TrunkError` if more is in flight than may be."""
        body, step, micro = place = _place(frame)
        if body == "close":
            self._kept.clear()
            return
        if body == "apply":
            self._kept.clear()  # the session has given back what counted for its step
        elif body == "backward":
            self._drop(("compute", step, micro))
        elif not self._session.round.training:
            for earlier in list(self._kept):  # evaluation goes on when it has the answer
                self._drop(earlier)
        self._session.hold(len(reply))
        self._kept[place] = checksum_of(raw), reply

    def _drop(self, place: _Place) -> None:
        _, reply = self._kept.pop(place, (b"", b""))
        self._session.release(len(reply))


def _place(frame: pb.ClientFrame) -> _Place:
    body = frame.WhichOneof("body") or ""
    asked = getattr(frame, body)
    return body, getattr(asked, "step", 0), getattr(asked, "micro", 0)
