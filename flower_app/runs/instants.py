"""Instants as they are written down: in UTC, and compared as instants, never as text."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

BEFORE_ALL = datetime.min.replace(tzinfo=UTC)


def now() -> str:
    """Return this instant in ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat()


def instant(text: Any) -> datetime:
    """Return the instant of an ISO 8601 text with any offset; `BEFORE_ALL` of what is none.

    Earlier Grafts wrote local times with their offset. A time without one is taken as UTC.
    """
    try:
        found = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return BEFORE_ALL
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
