"""Ends that stay with their clients (`aggregation.ends`): of which round each client's are.

The server never holds them. A client that trained keeps what came of it, and learns with its next
message whether that counted: by the round from which it is to go on.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from conf.load import to_json
from conf.schema import Config
from strategies.mail import lifetime, push, receive
from strategies.records import ARRAYS, CONFIG, TICKET
from strategies.rounds.answers import Profile, read_outcome

logger = logging.getLogger(__name__)


class LocalEnds:
    """Of which round each client's own ends are, by the client's name.

    Attributes
    ----------
    run : str
        Names the run to its clients, resumed or not, so that none takes another's ends for it.
    """

    def __init__(self) -> None:
        self.run = secrets.token_hex(16)
        self._last: dict[str, int] = {}
        self._best: dict[str, int] = {}

    def count(self, number: int, clients: Iterable[str]) -> None:
        """Take note of a round whose training counts."""
        self._last |= dict.fromkeys(clients, number)

    def better(self) -> None:
        """Take note that the last round is the best so far: its ends may be wanted again."""
        self._best = dict(self._last)

    def told(self, client: str) -> dict[str, str | int]:
        """What a message tells a client of its own ends; round 0: those it starts from."""
        last, best = self._last.get(client, 0), self._best.get(client, 0)
        return {"run": self.run, "ends-round": last, "ends-best": best}

    @property
    def rounds(self) -> dict[str, int]:
        """The last round of each client that trained in one that counted."""
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"run": self.run, "last": dict(self._last), "best": dict(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a `state_dict`."""
        self.run = state["run"]
        self._last, self._best = dict(state["last"]), dict(state["best"])


def ask_to_export(
    grid: Grid,
    config: Config,
    profiles: Iterable[Profile],
    local: LocalEnds,
    arrays: ArrayRecord,
    number: int,
) -> dict[str, str]:
    """Have each client save what stays with it, once the run is over.

    Parameters
    ----------
    grid : Grid
        Flower's.
    config : Config
        The run's.
    profiles : iterable of Profile
        Who is there.
    local : LocalEnds
        Whose ends are of which round.
    arrays : ArrayRecord
        What of the model is the same for all, as far as clients may have it.
    number : int
        The run's last round.

    Returns
    -------
    dict[str, str]
        Who has saved nothing, and why; those that are not there too.
    """
    asked = [profile for profile in profiles if profile.client in local.rounds]
    shared, timeout = ConfigRecord({"json": to_json(config)}), config.federation.round_timeout
    messages = []
    for profile in asked:
        told = {"round": number, "rounds": max(number, config.train.rounds), "export": True}
        ticket = ConfigRecord({**told, **local.told(profile.client)})
        content = RecordDict({ARRAYS: arrays, CONFIG: shared, TICKET: ticket})
        ttl = lifetime(timeout)
        messages.append(Message(content, profile.node, message_type=MessageType.QUERY, ttl=ttl))
    names = {profile.node: profile.client for profile in asked}
    failed = {
        client: f"it is not connected; what it kept of round {kept} is in its own folder still"
        for client, kept in local.rounds.items()
        if client not in names.values()
    }
    waiting, refused = push(grid, messages)
    for reply in [*refused, *receive(grid, waiting, timeout=timeout)]:
        try:
            read_outcome(reply)
        except ValueError as error:
            failed[names[reply.metadata.src_node_id]] = str(error)
    for message in waiting.values():
        failed[names[message.metadata.dst_node_id]] = f"no answer within {timeout:g} s"
    return failed
