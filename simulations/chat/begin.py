"""Begins a chat: opens the model, takes over settings or a saved chat, and talks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulations.chat.chat import Chat, greeting, terminal
from simulations.chat.dialogue import Dialogue, sampling_of
from simulations.chat.saved import load as load_saved
from simulations.talk.opening import Asked, opened


def begin(
    asked: Asked,
    chosen: Mapping[str, Any],
    *,
    system: str = "",
    load: Path | None = None,
) -> bool:
    """Talk with what the user named; False if something went wrong on the way.

    Parameters
    ----------
    chosen : mapping
        Settings of `Sampling`; those that are None are the model's own, or the saved chat's.
    system : str
        The system message; empty: the saved chat's, or none.
    load : Path, optional
        A saved chat to go on with.
    """
    place = terminal()
    with opened(asked) as speaker:
        dialogue = Dialogue(speaker=speaker, sampling=sampling_of(speaker), notice=place.note)
        if load is not None:
            load_saved(dialogue, load)
        dialogue.set(**{name: value for name, value in chosen.items() if value is not None})
        if system:
            dialogue.instruct(system)
        place.note(*greeting(dialogue))
        talk = Chat(dialogue, place)
        talk.run()
    return not (talk.failed and place.strict)
