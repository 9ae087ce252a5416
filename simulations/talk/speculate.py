"""Several tokens for one trip to the trunk: what `generate` is given so that it speculates."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flower_app.serving.source import Served
from models.bridge import BRIDGE_FILE, load_bridge
from models.draft import go_on_from_caches, make_draft, refuse_assisting

MODES = ("auto", "bridge", "lookup", "off")
"""What `--speculate` takes."""

TOKENS = {"bridge": 8, "lookup": 10}
"""Guessed at a time, unless `--draft-tokens` says otherwise."""

NGRAM = 5
"""How many of the last tokens are looked for in the text so far, at most."""


_LOG = logging.getLogger("transformers.generation.utils")


class _Advice(logging.Filter):
    """Holds back advice to callers of `generate` for what speculation does on purpose."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let all else pass."""
        return "Passing `generation_config` together with" not in str(record.msg)


def speculation(
    model: PreTrainedModel,
    mode: str = "auto",
    *,
    folders: Iterable[Path] = (),
    tokens: int = 0,
) -> dict[str, Any]:
    """Return options for `generate`, alike for greedy text and for sampling; empty: none.

    What is said keeps its distribution, and under greedy decoding its every token: the model checks
    each guess. One text at a time: `generate` takes no batch with them.

    Parameters
    ----------
    model : PreTrainedModel
        Split: of `models.remote.join_remote`.
    mode : str
        ``lookup``: what followed the last tokens where they stood before in the text. ``bridge``: a
        draft of the client's own ends. ``auto``: the bridge if there is one; nothing if the model
        has no trips to save, or cannot be set back. ``off``: nothing.
    folders : iterable of Path
        Where a bridge may lie: beside the model, or with a client's ends.
    tokens : int
        Guessed at a time; 0: as suits the mode.

    Raises
    ------
    ValueError
        If a mode is asked for by name that this model has not the means for.
    """
    if mode not in MODES:
        raise ValueError(f"speculation '{mode}' is unknown: {', '.join(MODES)}")
    if tokens < 0:
        raise ValueError(f"{tokens} draft tokens: give 1 or more, or 0 for what suits")
    found = next((folder for folder in folders if (folder / BRIDGE_FILE).is_file()), None)
    if mode == "auto":
        mode = _suitable(model, found)
    if mode == "off":
        return {}
    refuse_assisting(model)
    go_on_from_caches(model)
    if not any(isinstance(each, _Advice) for each in _LOG.filters):
        _LOG.addFilter(_Advice())
    count = tokens or TOKENS[mode]
    if mode == "lookup":
        return {"prompt_lookup_num_tokens": count, "max_matching_ngram_size": NGRAM}
    return {"assistant_model": _draft(model, found, count)}


def bridge_folders(served: Served) -> list[Path]:
    """Where the bridge of what is served may lie: with the ends, or beside the model."""
    run = None if served.run is None else served.run / "model"
    base = Path(served.base) if served.base else None
    return [folder for folder in (served.ends, served.adapter, run, base) if folder is not None]


def _suitable(model: PreTrainedModel, bridge: Path | None) -> str:
    if not hasattr(model, "graft_ends"):
        return "off"
    try:
        refuse_assisting(model)
    except ValueError:
        return "off"
    return "bridge" if bridge else "lookup"


def _draft(model: PreTrainedModel, folder: Path | None, tokens: int) -> PreTrainedModel:
    if not hasattr(model, "graft_ends"):
        raise ValueError(
            "a bridge stands for a trunk that is elsewhere, and this model is whole: there is no "
            "trip to save (--speculate off)"
        )
    if folder is None:
        raise ValueError(
            f"there is no {BRIDGE_FILE} with this model: train the run with train.bridge=256, or "
            "make one with `graft bridge`; --speculate lookup needs none"
        )
    bottom, top = model.graft_ends
    bridge = load_bridge(folder, hidden_size=bottom.hidden_size)
    return make_draft(bottom, top, bridge.to(model.device), tokens=tokens)
