"""The model that the page talks to: who answers, and where its parts are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from simulations.talk.speaker import Speaker


@dataclass(frozen=True, kw_only=True)
class Load:
    """What this page's conversations hold on the trunk, and how long they wait for it."""

    sessions: int
    kv_mib: float
    queued: float = 0.0
    """Seconds that the last step waited for its turn."""


@dataclass(frozen=True, kw_only=True)
class Talked:
    """A model that is being talked to."""

    speaker: Speaker
    description: str = ""
    """Family, blocks and cut, in words."""
    trunk: str = ""
    """Where the trunk is, as host and port; empty: the model is whole and here."""
    load: Callable[[], Load | None] | None = None
    """Asks how busy the trunk is; None: it does not tell."""

    @property
    def privacy(self) -> str:
        """What leaves this machine, in a sentence."""
        if not self.trunk:
            return "The whole model is on this machine; nothing leaves it."
        return (
            "Your text and the answer stay on this machine; the trunk at "
            f"{self.trunk} sees activations only."
        )
