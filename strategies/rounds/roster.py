"""Who could take part: every node is asked at first sight who it is."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from logging import INFO

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from conf.load import to_json
from conf.schema import Config
from models import Cut, Part
from strategies.engine.engine import TrunkEngine
from strategies.mail import lifetime, push, receive
from strategies.records import ARRAYS, CONFIG, TICKET, Form
from strategies.rounds.answers import Bounds, Profile, read_first_tensors, read_profile

logger = logging.getLogger(__name__)

TRIES = 3
"""Times that nodes which cannot take part are asked again before a round is given up for them."""


class Roster:
    """Asks every node at first sight who it is, and keeps what the connected ones answered.

    A name belongs to the node that used it first in this run, known by its id, which Flower vouches
    for, or by its key. In a resumed run nodes have new keys and are known by their ids, unless no
    id of before is there: without SuperNode authentication all may be new.

    Parameters
    ----------
    config : Config
        Travels with the question. Examples are counted for `federation.sampling=weighted` and
        `train.global_batch`.
    bounds : Bounds
        What a profile may say.
    """

    def __init__(self, config: Config, bounds: Bounds) -> None:
        self._config, self._bounds = config, bounds
        self._count = config.federation.sampling == "weighted" or config.train.global_batch > 0
        self._profiles: dict[int, Profile] = {}
        self._owners: dict[str, Profile] = {}
        self._here: set[int] = set()
        self._before: dict[str, int] = {}
        self._key_before = b""
        self._refused: dict[int, str] = {}
        self._asked: dict[str, Message] = {}

    def __getitem__(self, node: int) -> Profile:
        return self._profiles[node]

    @property
    def clients(self) -> list[str]:
        """Names of those who could take part when they were last asked."""
        return sorted(profile.client for profile in self._profiles.values())

    @property
    def here(self) -> list[Profile]:
        """Who could take part when they were last asked, by name."""
        return sorted(self._profiles.values(), key=lambda profile: profile.client)

    @property
    def names(self) -> dict[str, int]:
        """Whose each name is: the id of its node."""
        return {**self._before, **{name: owner.node for name, owner in self._owners.items()}}

    def keep(self, names: Mapping[str, int], key_check: bytes = b"") -> None:
        """Go on from the `names` of the run before, and from the key that its ends are masked with;
        empty: none is."""
        self._before, self._key_before = dict(names), key_check

    def compare(self, grid: Grid, known: Sequence[str]) -> None:
        """Say so if the clients are not those of the run before."""
        now = [profile.client for profile in self.gather(grid)]
        if known and now != known:
            logger.warning(
                "the clients differ from those of the run before: missing %s; new %s. The run goes "
                "on with those who are here, and will not equal one that was never stopped; to "
                "wait for all, resume with federation.min_clients=%d",
                ", ".join(sorted({*known} - {*now})) or "none",
                ", ".join(sorted({*now} - {*known})) or "none",
                len(known),
            )

    def gather(self, grid: Grid) -> list[Profile]:
        """Who can take part now, by name; waits until `federation.min_clients` are connected.

        Raises
        ------
        RuntimeError
            If so many are connected but fewer can take part, with every node's reason.
        """
        least = self._config.federation.min_clients
        for attempt in range(TRIES):
            if attempt:
                time.sleep(1)
            # At first nodes may take their time; those who were here and left may not come back.
            limit = self._config.federation.round_timeout if self._profiles else math.inf
            self.meet(grid, wait_for(grid, least, limit))
            if len(self._profiles) >= least:
                return self.here
        reasons = "; ".join(f"node {node}: {why}" for node, why in sorted(self._refused.items()))
        raise RuntimeError(
            f"{len(self._profiles)} of {len(self._profiles) + len(self._refused)} connected nodes "
            f"can take part, federation.min_clients={least} required: {reasons}"
        )

    def meet(self, grid: Grid, nodes: Sequence[int]) -> None:
        """Ask the nodes that have not said who they are, and forget those that have left.

        A round waits for the first answers as long as for any other, later only
        `link.grace` for a newcomer's; an answer that comes later counts from then on.
        """
        self._here = set(nodes)
        self._forget_all_but(self._here)
        open_to = {message.metadata.dst_node_id for message in self._asked.values()}
        new = [node for node in nodes if node not in self._profiles and node not in open_to]
        waiting, refused = push(grid, [self._question(node) for node in new])
        self._asked.update(waiting)
        link, federation = self._config.link, self._config.federation
        replies = receive(
            grid,
            self._asked,
            timeout=link.grace if self._profiles else federation.round_timeout,
            enough=lambda: not waiting.keys() & self._asked.keys(),
        )
        arrived = sorted([*refused, *replies], key=lambda reply: reply.metadata.src_node_id)
        for node in new:
            self._refused[node] = "it has not yet said who it is"
        for reply in arrived:
            self._learn(reply)
        for node in new:
            if node in self._refused:
                logger.warning("node %d does not take part: %s", node, self._refused[node])

    def forget(self, node: int) -> None:
        """Ask a node anew who it is, before it takes part again."""
        self._profiles.pop(node, None)

    def first_tensors(
        self, grid: Grid, model: str, form: Callable[[Cut, int], Form]
    ) -> dict[str, Tensor]:
        """Learn the tensors with which clients start from the first that tells them.

        Parameters
        ----------
        grid : Grid
            Flower's.
        model : str
            What the trunk was cut from, in words.
        form : callable
            What an answer must be, by the client's cut and rank.

        Raises
        ------
        RuntimeError
            If nobody does, with every reason.
        """
        usual = Cut(bottom=self._config.cut.bottom, top=self._config.cut.top)
        reasons = []
        # One with the run's own cut has all that the trunk has not.
        for profile in sorted(self.gather(grid), key=lambda p: (p.cut != usual, p.client)):
            try:
                return self._ask_tensors(grid, profile, model, form(profile.cut, profile.rank))
            except ValueError as error:
                reasons.append(f"{profile.client}: {error}")
                logger.warning("no first tensors from %s", reasons[-1])
        raise RuntimeError(f"no client tells the tensors it starts from: {'; '.join(reasons)}")

    def _ask_tensors(
        self, grid: Grid, profile: Profile, model: str, form: Form
    ) -> dict[str, Tensor]:
        question = self._question(profile.node, model=model, **{"send-tensors": True})
        waiting, refused = push(grid, [question])
        timeout = self._config.federation.round_timeout
        for reply in [*refused, *receive(grid, waiting, timeout=timeout)]:
            return read_first_tensors(reply, profile, form)
        raise ValueError(f"no answer within federation.round_timeout={timeout:g} s")

    def _forget_all_but(self, nodes: set[int]) -> None:
        self._profiles = {node: p for node, p in self._profiles.items() if node in nodes}
        self._refused = {node: why for node, why in self._refused.items() if node in nodes}
        self._asked = {i: m for i, m in self._asked.items() if m.metadata.dst_node_id in nodes}

    def _question(self, node: int, **more: str | bool) -> Message:
        rounds, count = self._config.train.rounds, self._count
        ticket = ConfigRecord({"round": 0, "rounds": rounds, "count-examples": count, **more})
        shared = ConfigRecord({"json": to_json(self._config)})
        return Message(
            content=RecordDict({ARRAYS: ArrayRecord(), CONFIG: shared, TICKET: ticket}),
            message_type=MessageType.QUERY,
            dst_node_id=node,
            ttl=lifetime(self._config.federation.round_timeout),
        )

    def _learn(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        try:
            profile = read_profile(node, reply, self._config, self._bounds)
            self._check_owner(profile)
            self._check_key(profile)
        except ValueError as error:
            self._refused[node] = str(error)
        else:
            self._refused.pop(node, None)
            self._profiles[node] = self._owners[profile.client] = profile

    def _check_key(self, profile: Profile) -> None:
        """All sites of a run mask with one key: that of the run before, or of the first."""
        first = next(iter(self._owners.values()), profile)
        wanted, whose = first.key_check, first.client
        if self._key_before:
            wanted, whose = self._key_before, "the ends of the run before are masked with"
        if profile.key_check != wanted:
            raise ValueError(
                f"{profile.client} has another site key (check {profile.key_check.hex()}) than "
                f"{whose} (check {wanted.hex()}): give all sites the same file, as "
                "site-key in --node-config"
            )

    def _check_owner(self, profile: Profile) -> None:
        """Names seed the order of the data and weigh in the mean: two nodes may not share one."""
        owner = self._owners.get(profile.client, profile)
        before = self._before.get(profile.client, profile.node)
        if owner is profile and before != profile.node and self._here & {*self._before.values()}:
            raise ValueError(
                f"it is called '{profile.client}', which was node {before} before this run was "
                "resumed: the name stays that node's. Give this SuperNode a name of its own (with "
                "SuperNode authentication, one that is started anew stays the same node)"
            )
        if owner.node in self._profiles and owner.node != profile.node:
            raise ValueError(
                f"it is called '{profile.client}' like node {owner.node}, and names seed the "
                "order of the data; give each SuperNode a name of its own "
                "(--node-config 'name=\"...\"')"
            )
        if owner.node != profile.node and owner.public_key != profile.public_key:
            raise ValueError(
                f"it is called '{profile.client}' like node {owner.node}, which has left, and "
                "shows another key: in this run the name stays that node's. Give this SuperNode a "
                "name of its own (with SuperNode authentication, one that is started anew stays "
                "the same node)"
            )


def needs_first_tensors(config: Config) -> bool:
    """Whether the server must know what the clients start from: not for plain averaging."""
    return config.train.sync == "step" or config.aggregation.optimizer != "fedavg"


def bounds_of(engine: TrunkEngine) -> Bounds:
    """What clients may say of themselves, given the trunk."""
    trunk = engine.trunk
    assert isinstance(trunk, Part)
    return Bounds(
        blocks=trunk.num_blocks_total,
        width=engine.hidden_size,
        own_cut=engine.policy.replicates,
    )


def wait_for(grid: Grid, least: int, limit: float = math.inf) -> list[int]:
    """The ids of the connected nodes, once there are `least`; RuntimeError after `limit` s."""
    waited = 0
    while len(nodes := sorted(grid.get_node_ids())) < least:
        if waited % 10 == 0:
            text = "waiting for clients: %d connected, federation.min_clients=%d required"
            log(INFO, text, len(nodes), least)
        if waited >= limit:
            raise RuntimeError(
                f"{len(nodes)} nodes are connected, federation.min_clients={least} required, and "
                f"no more came within federation.round_timeout={limit:g} s"
            )
        time.sleep(1)
        waited += 1
    return nodes
