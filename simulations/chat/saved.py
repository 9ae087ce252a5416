"""A chat as a JSON file: messages, settings, figures."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeGuard

from simulations.chat.dialogue import Dialogue
from simulations.talk.speaker import Sampling

FORMAT = "graft-chat"
VERSION = 1


def save(dialogue: Dialogue, path: Path) -> None:
    """Write a chat, readable by its owner alone; another file than a chat is not overwritten."""
    path = path.expanduser()
    if path.exists():
        _read(path)
    text = json.dumps(_as_dict(dialogue), indent=2, ensure_ascii=False) + "\n"
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(dialogue: Dialogue, path: Path) -> None:
    """Go on with a saved chat: its messages, system message and settings."""
    saved = _read(path.expanduser())
    messages, sampling = saved.get("messages"), saved.get("sampling")
    if not _are_messages(messages) or not isinstance(sampling, dict):
        raise ValueError(f"{path} is damaged: it has no messages in turn, or no settings")
    fields = {one.name for one in dataclasses.fields(Sampling)}
    if wrong := set(sampling) - fields:
        raise ValueError(f"{path} has settings that this Graft does not know: {sorted(wrong)}")
    dialogue.reset()
    dialogue.instruct(str(saved.get("system", "")))
    dialogue.set(**{**sampling, "stop": tuple(sampling.get("stop", ()))})
    dialogue.messages.extend({key: one[key] for key in ("role", "content")} for one in messages)
    if saved.get("model") != dialogue.speaker.name:
        dialogue.notice(f"{path} is a chat with {saved.get('model')}.")


def _as_dict(dialogue: Dialogue) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dialogue.speaker.name,
        "system": dialogue.system,
        "messages": dialogue.messages,
        "sampling": dataclasses.asdict(dialogue.sampling),
        "stats": dialogue.total.as_dict(),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise ValueError(f"{path} is no saved chat; name a file that /save wrote, or a new one")
    if saved.get("version") != VERSION:
        raise ValueError(f"{path} has version {saved.get('version')}; this Graft reads {VERSION}")
    return saved


def _are_messages(messages: Any) -> TypeGuard[list[dict[str, str]]]:
    """Whether questions and answers come in turn."""
    if not isinstance(messages, list) or len(messages) % 2:
        return False
    roles = ("user", "assistant") * (len(messages) // 2)
    return all(
        isinstance(one, dict) and one.get("role") == role and isinstance(one.get("content"), str)
        for one, role in zip(messages, roles, strict=True)
    )
