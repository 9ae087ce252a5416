"""`cut`: Where the model is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class CutConfig(Section):
    """Where the model is cut, in blocks."""

    section: ClassVar[str] = "cut"

    bottom: int = setting(1, rules.COUNT_OR_ZERO)
    """Blocks that every client keeps below the trunk."""
    top: int = setting(1, rules.COUNT_OR_ZERO)
    """Blocks that every client keeps above the trunk."""
