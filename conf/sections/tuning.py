"""`tuning`: What is trained in each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf.rules import ConfigError, one_of, setting
from conf.sections.base import Section

_MODE = one_of("full", "lora", "frozen")


@dataclass(frozen=True, kw_only=True)
class TuningConfig(Section):
    """What is trained in each part: full, lora or frozen."""

    section: ClassVar[str] = "tuning"

    bottom: str = setting("lora", _MODE)
    trunk: str = setting("lora", _MODE)
    top: str = setting("lora", _MODE)

    def _check_together(self) -> None:
        if self.bottom == self.trunk == self.top == "frozen":
            raise ConfigError(
                "tuning.bottom, tuning.trunk and tuning.top are all frozen: nothing would be "
                "trained; make one of them lora or full",
                key="tuning.trunk",
            )
