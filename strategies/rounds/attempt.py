"""One attempt at a round: a cohort is asked to train or to evaluate, its answers are checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from conf.load import to_json
from conf.schema import Config
from models import Cut
from strategies.engine.engine import TrunkEngine
from strategies.events import Answered, Asked, Observer
from strategies.mail import lifetime
from strategies.records import ARRAYS, CONFIG, TICKET, Form, check_values
from strategies.rounds.answers import Answer, Profile, Seen, read_evaluated, read_trained
from strategies.rounds.cohort import Cohort
from strategies.rounds.local import LocalEnds
from strategies.rounds.sampling import draw_batches
from strategies.rounds.tally import Tally
from strategies.transport.plane import Plane
from strategies.transport.tickets import Guest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What all rounds of a run share."""

    engine: TrunkEngine
    plane: Plane
    config: Config
    model: str
    """What the trunk was cut from, in words; a client with another model refuses to train."""
    form: Callable[[Cut, int], Form]
    """Names and shapes of what a client of this cut and rank trains, and answers with."""
    observer: Observer
    """Told who is asked, and what becomes of each answer."""
    masked: Callable[[], Mapping[str, Any]] = dict
    """What a message says of the masked ends that it brings."""
    local: LocalEnds | None = None
    """Of which round each client's own ends are; None: all have the average."""


class Attempt:
    """Opens a round, and takes its cohort through it.

    Parameters
    ----------
    run : Run
        The run's engine, plane and configuration.
    number, rounds, attempt : int
        Which round of how many, and which attempt at it.
    profiles : sequence of Profile
        Who was drawn.
    count : int
        Answers that are enough.
    training : bool
        False: forward only.
    """

    def __init__(
        self,
        run: Run,
        number: int,
        rounds: int,
        attempt: int,
        profiles: Sequence[Profile],
        count: int,
        *,
        training: bool,
    ) -> None:
        self._run, self._number, self._rounds, self._training = run, number, rounds, training
        self._drawn: dict[str, list[int]] | None = None
        self._nonces: set[bytes] = set()
        config = run.config
        if training and config.train.global_batch:
            self._drawn = drawn = draw_batches(profiles, config.train, config.seed, number)
            # Whoever gives nothing to any step is not asked.
            profiles = [profile for profile in profiles if any(drawn[profile.client])]
            count = min(count, len(profiles))
        self._place: dict[str, Any] = {"round": number, "attempt": attempt, "training": training}
        stem = f"{'train' if training else 'evaluate'}-{number}.{attempt}"
        self.cohort = Cohort(profiles, count, stem)
        # Before anybody is asked: to outline a model is nothing to do while others train.
        places = {(profile.cut, profile.rank) for profile in profiles} if training else set()
        self._forms = {place: run.form(*place) for place in places}

    def open(self, arrays_for: Callable[[Cut, int], ArrayRecord]) -> list[Message]:
        """Open the round on the trunk; returns the message to each client."""
        run, cohort = self._run, self.cohort
        run.engine.open_round(
            self._number,
            self._rounds,
            training=self._training,
            cohort=len(cohort.profiles),
            revocable=self._training and run.config.federation.retries > 0,
        )
        run.observer(Asked(**self._place, clients=cohort.turnout.asked))
        shared = ConfigRecord({"json": to_json(run.config)})
        return [
            Message(
                content=RecordDict(
                    {
                        ARRAYS: arrays_for(profile.cut, profile.rank),
                        CONFIG: shared,
                        TICKET: self._ticket(profile),
                    }
                ),
                message_type=MessageType.TRAIN if self._training else MessageType.EVALUATE,
                dst_node_id=profile.node,
                ttl=lifetime(run.config.federation.round_timeout),
            )
            for profile in cohort.profiles
        ]

    def exchange(self, grid: Grid, messages: Iterable[Message]) -> Iterator[Message]:
        """Bring the messages to the clients and yield one reply for each; see `Plane.exchange`."""
        engine, keys = self._run.engine, self.cohort.keys
        for reply in self._run.plane.exchange(
            grid,
            list(messages),
            keys,
            timeout=self._run.config.federation.round_timeout,
            enough=self.cohort.enough,
        ):
            if not engine.has(keys[reply.metadata.src_node_id]):
                engine.miss()  # so that `merged` does not wait for it
            yield reply

    def collect(self, replies: Iterable[Message]) -> list[Answer]:
        """Check the replies as they come; returns the answers that hold, by name."""
        answers = self.cohort.collect(replies, self._read, self._tell)
        self._run.plane.end_round()
        return answers

    def give_up(self, tally: Tally) -> None:
        """Undo a training round without quorum; `RuntimeError` if it may not be tried again."""
        engine, federation = self._run.engine, self._run.config.federation
        text = self.cohort.no_quorum(tally.number, self._run.config)
        if tally.attempt > federation.retries:
            engine.close_round()
            again = f" (attempt {tally.attempt} of {tally.attempt})" if federation.retries else ""
            raise RuntimeError(f"{text}{again}")
        engine.abandon_round()
        tally.abandoned.append(self.cohort.turnout)
        logger.warning("%s. Attempt %d of %d follows", text, tally.attempt, federation.retries + 1)

    def _tell(self, client: str, why: str) -> None:
        self._run.observer(Answered(**self._place, client=client, why=why))

    def _read(self, reply: Message, profile: Profile, key: str) -> Answer:
        # Its last word: what the trunk has seen of it does not change any more.
        tokens, steps = self._run.engine.finish(key)
        seen = Seen(tokens=tokens, steps=steps)
        if not self._training:
            return read_evaluated(reply, profile, key, seen)
        answer = read_trained(reply, profile, key, self._forms[profile.cut, profile.rank], seen)
        if answer.masked is not None:
            if answer.masked.nonce in self._nonces:
                raise ValueError("its mask was made of the nonce of another client's")
            self._nonces.add(answer.masked.nonce)
        for name, tensor in self._run.engine.policy.states([key]).get(key, {}).items():
            check_values(name, tensor)  # its replica of the trunk is averaged too
        return answer

    def _ticket(self, profile: Profile) -> ConfigRecord:
        run, cut = self._run, run_cut(self._run.config)
        guest = Guest(
            key=self.cohort.keys[profile.node],
            client=profile.client,
            public_key=profile.public_key,
            cut=None if profile.cut == cut else profile.cut,
        )
        ticket = ConfigRecord(
            {
                **run.plane.ticket(guest).as_record(),
                "model": run.model,
                "round": self._number,
                "rounds": self._rounds,
                **run.masked(),
            }
        )
        if run.local is not None:
            ticket.update(run.local.told(profile.client))
        if self._drawn is not None:
            ticket["batch-sizes"] = self._drawn[profile.client]
        return ticket


def run_cut(config: Config) -> Cut:
    """Where the run's trunk begins and ends."""
    return Cut(bottom=config.cut.bottom, top=config.cut.top)
