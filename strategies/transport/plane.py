"""What the strategy needs of whatever carries activations and gradients to the trunk and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from conf.schema import Config
from strategies.mail import never
from strategies.transport.conversation import StepReport
from strategies.transport.tickets import Guest, Ticket


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the trunk's engine must know of the plane that serves it."""

    turn: float
    """Seconds that a session may wait for its turn, or for the cohort."""
    graphs: int
    """Micro-batches of a session that may wait for their backward; 0: all of a step."""


class Plane(Protocol):
    """Serves a trunk's engine to the guests of the open round."""

    address: str
    """Where, in words."""
    on_step: Callable[[StepReport], None]
    """Called after each step, from any thread."""

    @staticmethod
    def limits(config: Config) -> Limits:
        """What an engine behind this plane is built with."""

    def start(self) -> str:
        """Accept sessions; returns the address."""

    def ticket(self, guest: Guest) -> Ticket:
        """Admit a guest to one session of the open round."""

    def exchange(
        self,
        grid: Grid,
        messages: Sequence[Message],
        keys: Mapping[int, str],
        *,
        timeout: float,
        enough: Callable[[], bool] = never,
    ) -> Iterator[Message]:
        """Bring the round's messages to the clients, and see the round through.

        Parameters
        ----------
        grid : Grid
            Flower's.
        messages : sequence of Message
            One for each client.
        keys : mapping
            The session's name for each node.
        timeout : float
            Seconds for the whole round (`federation.round_timeout`).
        enough : callable
            Whether the answers so far suffice.

        Yields
        ------
        Message
            One final reply for each message: the client's, or an error that says why not.
        """

    def end_round(self) -> None:
        """Nobody admitted to the round may begin or go on."""

    def stop(self) -> None:
        """Refuse new sessions and end the open ones."""
