"""`tracking`: Who else is told what happens in a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Who else is told what happens in a run, besides its folder and the console."""

    section: ClassVar[str] = "tracking"

    sinks: tuple[str, ...] = setting((), rules.NAMES)
    """Modules of flower_app/runs/sinks."""
    project: str = setting("", rules.NAME_OR_EMPTY)
    """What trackers file the run under; empty: their own variable (WANDB_PROJECT), else graft."""
