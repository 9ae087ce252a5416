"""`lora`: Low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685), as in `peft.LoraConfig`."""

    section: ClassVar[str] = "lora"

    rank: int = setting(8, rules.COUNT)
    alpha: float = setting(16.0, rules.POSITIVE)
    dropout: float = setting(0.0, rules.BELOW_ONE)
    target_modules: tuple[str, ...] = setting((), rules.NAMES)
    """Names of layers and of experts' weights to adapt; empty: all that can be of the blocks."""
