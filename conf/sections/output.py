"""`output`: What a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import one_of, setting
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
    model: str = setting("last", one_of("last", "best"))
    """Which round's model is exported: the last, or that of the lowest held-out loss (of the
    central evaluation, if there is one). Its checkpoint is kept, whatever `checkpoint_every`."""
    share_trunk: bool = False
    """With `aggregation.ends` local: send the trained trunk to the sites at the end, so that each
    exports a whole model of its own. Off: a site exports its ends, the server the trunk."""
    checkpoint_every: int = setting(1, rules.COUNT_OR_ZERO)
    """Rounds between checkpoints, from which `resume` goes on; the last round has one. 0: none."""
    keep_checkpoints: int = setting(2, rules.COUNT)
    """How many of the last checkpoints stay; the one of the best held-out loss stays besides."""
