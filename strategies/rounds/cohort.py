"""The clients of one round, and those of their answers that hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from flwr.app import Message

from strategies.events import Turnout
from strategies.rounds.answers import Answer, read_answer
from strategies.rounds.roster import Profile


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

    def collect(
        self, replies: Iterable[Message], check: Callable[[Answer], str] = lambda answer: ""
    ) -> list[Answer]:
        """Read replies as they come; the turnout learns who is missing.

        Parameters
        ----------
        replies : iterable of Message
            At most one for each node.
        check : callable
            Why an answer cannot be used; empty if it can.

        Returns
        -------
        list of Answer
            Those that hold, in the order of client names.
        """
        waiting = {profile.node: profile for profile in self.profiles}
        for reply in replies:
            profile = waiting.pop(reply.metadata.src_node_id, None)
            if profile is None:
                continue
            answer = read_answer(self.keys[profile.node], reply, profile.client)
            error = answer.error or _name_error(answer, profile) or check(answer)
            if error:
                self.missing[profile.client] = error
            else:
                self.answers.append(answer)
        for profile in waiting.values():
            self.missing[profile.client] = "no answer"
        self.answers.sort(key=lambda answer: answer.client)
        return list(self.answers)

    def drop(self, reasons: dict[str, str]) -> list[Answer]:
        """Take out the answers of these session keys, for these reasons; returns the others."""
        for answer in self.answers:
            if answer.key in reasons:
                self.missing[answer.client] = reasons[answer.key]
        self.answers = [answer for answer in self.answers if answer.key not in reasons]
        return list(self.answers)


def _name_error(answer: Answer, profile: Profile) -> str:
    if answer.client == profile.client:
        return ""
    return f"it answers as '{answer.client}' and was '{profile.client}' when it was asked who it is"
