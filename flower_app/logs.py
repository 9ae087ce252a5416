"""Graft's own words among the lines of Flower and Ray: one mark tells them apart."""

from __future__ import annotations

import logging
import sys

MARK = "graft "
"""What a line begins with that one of Graft's modules logged: `graft WARNING: ...`."""
PACKAGES = ("conf", "models", "strategies", "flower_app")


class _Marked(logging.Handler):
    """Writes to the standard error of the moment, which Flower and Ray exchange."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def mark_lines() -> None:
    """Print what Graft's modules log, marked. For entry points; to call it again is harmless."""
    for name in PACKAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Marked) for handler in logger.handlers):
            handler = _Marked()
            handler.setFormatter(logging.Formatter(f"{MARK}%(levelname)s: %(message)s"))
            logger.addHandler(handler)
