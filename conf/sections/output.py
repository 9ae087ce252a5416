"""`output`: What a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section):
    """What a run leaves."""

    section: ClassVar[str] = "output"

    folder: str = ""
    """Parent of the run folders; empty: `$GRAFT_HOME/runs`, by default `~/.graft/runs`."""
    log_every: int = setting(10, rules.COUNT)
    """Optimizer steps between progress lines."""
    save_model: bool = True
    checkpoint_every: int = setting(1, rules.COUNT_OR_ZERO)
    """Rounds between checkpoints, from which `resume` goes on; the last round has one. 0: none."""
    keep_checkpoints: int = setting(2, rules.COUNT)
    """How many of the last checkpoints stay; the one of the best held-out loss stays besides."""
