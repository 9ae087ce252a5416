"""Who could take part, and who is drawn."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from conf.load import to_json
from conf.schema import Config, FederationConfig, TrainConfig
from strategies.mail import push, receive
from strategies.optim import derive_seed
from strategies.records import ARRAYS, CONFIG, OUTCOME, PROFILE, TICKET, from_arrays
from strategies.transport.tickets import is_usable

logger = logging.getLogger(__name__)

TRIES = 3
"""Times that nodes which cannot take part are asked again before a round is given up for them."""

ROUNDING = 1e-9
"""0.55 * 100 is a little more than 55."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a client tells of itself: its name, its own cut and rank, and its training examples.

    `examples` is 0 where nobody needs to know: to count them means to load the data. `public_key`
    is what its tickets are made for.
    """

    node: int
    client: str
    bottom: int
    top: int
    rank: int
    examples: int = 0
    public_key: bytes = b""


class Roster:
    """Asks every node at first sight who it is, and keeps what the connected ones answered.

    Parameters
    ----------
    config : Config
        Travels with the question. Examples are counted for `federation.sampling=weighted` and
        `train.global_batch`.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._count = config.federation.sampling == "weighted" or config.train.global_batch > 0
        self._profiles: dict[int, Profile] = {}
        self._refused: dict[int, str] = {}
        self._asked: dict[str, Message] = {}

    def __getitem__(self, node: int) -> Profile:
        return self._profiles[node]

    @property
    def clients(self) -> list[str]:
        """Names of those who could take part when they were last asked."""
        return sorted(profile.client for profile in self._profiles.values())

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
                return sorted(self._profiles.values(), key=lambda profile: profile.client)
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
        self._forget_all_but(set(nodes))
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
        self, grid: Grid, present: Sequence[Profile], model: str
    ) -> dict[str, Tensor]:
        """The tensors with which clients start, from the first of `present` that tells them.

        Raises
        ------
        RuntimeError
            If nobody does, with every reason.
        """
        reasons = []
        for profile in present:
            question = self._question(profile.node, model=model, **{"send-tensors": True})
            waiting, refused = push(grid, [question])
            timeout = self._config.federation.round_timeout
            for reply in [*refused, *receive(grid, waiting, timeout=timeout)]:
                records = {} if reply.has_error() else reply.content.config_records
                error = reply.error.reason if reply.has_error() else records[OUTCOME]["error"]
                if not error:
                    return from_arrays(reply.content.array_records[ARRAYS])
                reasons.append(f"{profile.client}: {error}")
        raise RuntimeError(f"no client tells the tensors it starts from: {'; '.join(reasons)}")

    def draw(
        self,
        present: Sequence[Profile],
        count: int,
        number: int,
        attempt: int = 1,
        avoid: Iterable[str] = (),
    ) -> list[Profile]:
        """Draw the cohort of an attempt at round `number`; see `choose`.

        Their order is drawn too, for the round: where clients run one by one, those asked first
        answer first, and should not be the same ones in every round.
        """
        again = (attempt,) if attempt > 1 else ()
        seed = derive_seed(self._config.seed, number, "sample", *again)
        weighted = self._config.federation.sampling == "weighted"
        cohort = choose(present, count, seed, weighted=weighted, avoid=avoid)
        return sorted(
            cohort, key=lambda p: derive_seed(self._config.seed, number, "order", p.client)
        )

    def _forget_all_but(self, nodes: set[int]) -> None:
        self._profiles = {node: p for node, p in self._profiles.items() if node in nodes}
        self._refused = {node: why for node, why in self._refused.items() if node in nodes}
        self._asked = {i: m for i, m in self._asked.items() if m.metadata.dst_node_id in nodes}

    def _question(self, node: int, **more: str | bool) -> Message:
        rounds, count = self._config.train.rounds, self._count
        ticket = ConfigRecord({"round": 0, "rounds": rounds, "count-examples": count, **more})
        shared = ConfigRecord({"json": to_json(self._config)})
        content = RecordDict({ARRAYS: ArrayRecord(), CONFIG: shared, TICKET: ticket})
        return Message(content=content, message_type=MessageType.QUERY, dst_node_id=node)

    def _learn(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        try:
            profile = read_profile(node, reply)
            taken = [p.node for p in self._profiles.values() if p.client == profile.client]
            if taken:
                raise ValueError(
                    f"it is called '{profile.client}' like node {taken[0]}, and names seed the "
                    "order of the data; give each SuperNode a name of its own "
                    "(--node-config 'name=\"...\"')"
                )
        except (KeyError, TypeError, ValueError) as error:
            self._refused[node] = f"{error}"
        else:
            self._refused.pop(node, None)
            self._profiles[node] = profile


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


def read_profile(node: int, reply: Message) -> Profile:
    """Read the answer to a question; `ValueError` if there is none or it makes no sense."""
    if reply.has_error():
        raise ValueError(reply.error.reason or f"Flower's error {reply.error.code}")
    records = reply.content.config_records
    outcome: Mapping[str, Any] = records.get(OUTCOME, {})
    if error := outcome.get("error"):
        raise ValueError(str(error))
    told: Mapping[str, Any] = records.get(PROFILE, {})
    name = outcome.get("client")
    if not isinstance(name, str) or not name:
        raise ValueError(f"it says it is called {name!r}")
    numbers = {
        "cut-bottom": (0, 10_000), "cut-top": (0, 10_000), "lora-rank": (1, 65_536),
        "examples": (0, 10_000_000),
    }  # fmt: skip
    for key, (least, most) in numbers.items():
        value = told.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} says {key}={value!r}")
    public_key = told.get("public-key")
    if not is_usable(public_key):
        raise ValueError(
            f"{name} shows no key to make its tickets for; run the same release of Graft there"
        )
    return Profile(
        node=node,
        client=name,
        bottom=told["cut-bottom"],
        top=told["cut-top"],
        rank=told["lora-rank"],
        examples=told["examples"],
        public_key=public_key,
    )


def draw_batches(
    cohort: Sequence[Profile], train: TrainConfig, seed: int, number: int
) -> dict[str, list[int]]:
    """Draw how many examples each client gives to each step, so that all steps have `global_batch`.

    As if the clients' examples lay in one heap and were drawn without replacement, anew when the
    heap is empty: multivariate hypergeometric counts. Source: Kohankhaki et al. 2024, *Parallel
    Split Learning with Global Sampling* (arXiv:2407.15738). Which examples they are, clients draw.

    Returns
    -------
    dict[str, list of int]
        By client; one number for each step, 0 where it has no example in it. Without
        `train.local_steps` an epoch's last step has what is left.
    """
    names = [profile.client for profile in cohort]
    heap = np.array([profile.examples for profile in cohort], dtype=np.int64)
    if heap.sum() == 0:
        raise RuntimeError("train.global_batch: no client of the cohort has an example")
    random = np.random.default_rng(derive_seed(seed, number, "global-batch"))
    epoch = math.ceil(heap.sum() / train.global_batch)
    steps, left, drawn = train.local_steps or epoch * train.local_epochs, heap * 0, []
    for _ in range(steps):
        if not left.sum():
            left = heap.copy()
        taken = random.multivariate_hypergeometric(left, min(train.global_batch, int(left.sum())))
        left = left - taken
        drawn.append(taken)
    return {name: [int(taken[i]) for taken in drawn] for i, name in enumerate(names)}


def sizes(present: int, fraction: float, federation: FederationConfig) -> tuple[int, int]:
    """How many answers a round needs of how many clients: the share asked for, and `min_clients`.

    Returns
    -------
    count, asked : int
        The cohort, and with it those who are asked beyond it (`federation.oversample`).
    """
    count = min(present, max(federation.min_clients, round(fraction * present)))
    return count, min(present, math.ceil(count * (1 + federation.oversample) - ROUNDING))


def quorum(count: int, share: float) -> int:
    """How many of `count` answers let a round count: at least one."""
    return max(1, math.ceil(share * count - ROUNDING))


def choose(
    present: Sequence[Profile], count: int, seed: int, *, weighted: bool, avoid: Iterable[str] = ()
) -> list[Profile]:
    """Draw `count` clients without replacement, by name, so that equal seeds draw alike.

    Each client gets the key ``-ln(u) / w``, with u uniform in (0, 1] from the seed and its name,
    and the smallest keys win: Efraimidis & Spirakis 2006, *Weighted random sampling with a
    reservoir* (Information Processing Letters 97(5)), whose keys ``u ** (1 / w)`` have the reverse
    order. It is as if clients were drawn one after the other, each time with probability in
    proportion to w among those left.

    Parameters
    ----------
    present : sequence of Profile
        Who can take part.
    count : int
        How many to draw.
    seed : int
        Of this draw.
    weighted : bool
        w is a client's examples, else 1. A client without examples comes last.
    avoid : iterable of str
        Names to draw only if the others are too few.

    Returns
    -------
    list of Profile
        By name.
    """
    shunned = set(avoid)

    def key(profile: Profile) -> tuple[bool, float, str]:
        uniform = 1.0 - random.Random(derive_seed(seed, profile.client)).random()
        weight = profile.examples if weighted else 1
        place = -math.log(uniform) / weight if weight else math.inf
        return profile.client in shunned, place, profile.client

    return sorted(sorted(present, key=key)[:count], key=lambda profile: profile.client)
