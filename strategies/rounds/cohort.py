"""The clients of one round, and those of their answers that hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message

from conf.schema import Config
from strategies.events import Turnout
from strategies.rounds.answers import Answer, Profile
from strategies.rounds.sampling import needed

Tell = Callable[[str, str], None]
"""Takes a client's name, and why its answer does not count; empty: it does."""
Read = Callable[[Message, Profile, str], Answer]
"""Reads the reply of a client whose session has this key; `ValueError` if it cannot count."""


class Cohort:
    """Those who were asked for one thing.

    Parameters
    ----------
    profiles : sequence of Profile
        Who is asked.
    count : int
        Answers that are enough.
    stem : str
        Begins the clients' session keys. It names the purpose, the round and the attempt, so that
        the late frames of one attempt move nothing of the next.
    """

    def __init__(self, profiles: Sequence[Profile] = (), count: int = 0, stem: str = "") -> None:
        self.profiles, self.count = profiles, count
        self.keys = {profile.node: f"{stem}-{profile.node}" for profile in profiles}
        self.answers: list[Answer] = []
        self.missing: dict[str, str] = {}

    @property
    def turnout(self) -> Turnout:
        """What became of those who were asked, so far."""
        return Turnout(
            asked=tuple(sorted(profile.client for profile in self.profiles)),
            clients=tuple(answer.client for answer in self.answers),
            missing=dict(self.missing),
        )

    def enough(self) -> bool:
        """Whether so many answers hold as are needed."""
        return len(self.answers) >= self.count

    def no_quorum(self, number: int, config: Config) -> str:
        """Why training round `number` does not count."""
        turnout = self.turnout
        if not turnout.clients:
            return f"no client finished training in round {number}: {turnout.reasons()}"
        how = config.aggregation
        robust = f", with aggregation.robust={how.robust}," if how.robust != "none" else ""
        return (
            f"round {number} has no quorum: federation.quorum={config.federation.quorum:g} of "
            f"{self.count} clients{robust} is {needed(self.count, config)}, "
            f"{len(turnout.clients)} answered ({', '.join(turnout.clients)}); {turnout.reasons()}"
        )

    def collect(self, replies: Iterable[Message], read: Read, tell: Tell) -> list[Answer]:
        """Read replies as they come; the turnout learns who is missing.

        Parameters
        ----------
        replies : iterable of Message
            At most one for each node.
        read : callable
            Checks one.
        tell : callable
            Told of each client once, as soon as it is known what becomes of its answer.

        Returns
        -------
        list of Answer
            Those that hold, in the order of client names.
        """
        waiting = {profile.node: profile for profile in self.profiles}
        for reply in replies:
            profile = waiting.pop(reply.metadata.src_node_id, None)
            if profile is not None:
                self._take(reply, profile, read)
                tell(profile.client, self.missing.get(profile.client, ""))
        for profile in waiting.values():
            self.missing[profile.client] = "no answer"
            tell(profile.client, "no answer")
        self.answers.sort(key=lambda answer: answer.client)
        return list(self.answers)

    def _take(self, reply: Message, profile: Profile, read: Read) -> None:
        try:
            self.answers.append(read(reply, profile, self.keys[profile.node]))
        except ValueError as error:
            self.missing[profile.client] = str(error)
