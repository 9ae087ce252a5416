"""A trunk elsewhere that is asked with what a client's defence lets through."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from flower_app.client.defences.defence import Defence
from models.elsewhere import Crossed, RemoteSession, RemoteTrunk


class DefendedTrunk:
    """Generation's place for a defence: what goes to the trunk passes it.

    Parameters
    ----------
    trunk : RemoteTrunk
        Answers.
    defence : Defence
        The client's.
    """

    def __init__(self, trunk: RemoteTrunk, defence: Defence) -> None:
        self._trunk, self._defence = trunk, defence
        self._calls = itertools.count(1)

    def open(self) -> RemoteSession:
        """See `RemoteTrunk.open`."""
        return _Session(self._trunk.open(), self._defence, self._calls)


class _Session:
    """A session with the defence before it.

    Each call is a place of its own, for all sessions of the process: a token that comes again,
    alone as generated ones do, must not look the same again. What is sent again lies behind this.
    """

    def __init__(
        self, session: RemoteSession, defence: Defence, calls: itertools.count[int]
    ) -> None:
        self._session, self._defence, self._calls = session, defence, calls

    def forward(self, h_BTD: Tensor, **call: Any) -> Crossed:
        """See `RemoteSession.forward`."""
        place = f"generate/{next(self._calls)}"
        defended_BTD = self._defence.up(h_BTD.detach(), call.get("mask_BT"), place)
        return self._session.forward(defended_BTD, **call)

    def fork(self) -> RemoteSession:
        """See `RemoteSession.fork`."""
        return _Session(self._session.fork(), self._defence, self._calls)

    def close(self) -> None:
        """See `RemoteSession.close`."""
        self._session.close()
