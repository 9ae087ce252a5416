"""What every section does: it reads and checks its fields, then what belongs together."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

from conf import rules


class Section:
    """A part of the configuration; its subclasses are frozen, keyword-only dataclasses."""

    section: ClassVar[str]
    """Its name in `Config`, which begins its keys."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            key = f"{self.section}.{item.name}"
            value = rules.checked(
                getattr(self, item.name), str(item.type), item.metadata.get("rule"), key
            )
            object.__setattr__(self, item.name, value)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse what may not be set together in this section."""
