"""A trunk elsewhere that is asked with what a client's defence lets through."""

from __future__ import annotations

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

    def open(self) -> RemoteSession:
        """See `RemoteTrunk.open`."""
        return _Session(self._trunk.open(), self._defence)


class _Session:
    """A session with the defence before it."""

    def __init__(self, session: RemoteSession, defence: Defence) -> None:
        self._session, self._defence = session, defence

    def forward(self, h_BTD: Tensor, **call: Any) -> Crossed:
        """See `RemoteSession.forward`."""
        return self._session.forward(self._defence.up(h_BTD.detach(), call.get("mask_BT")), **call)

    def fork(self) -> RemoteSession:
        """See `RemoteSession.fork`."""
        return _Session(self._session.fork(), self._defence)

    def close(self) -> None:
        """See `RemoteSession.close`."""
        self._session.close()
