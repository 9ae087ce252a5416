"""what goes wrong while an answer is made, as OpenAI's clients are told"""

from __future__ import annotations

import logging

from simulations.api.errors import BUSY, ApiError, away, internal
from strategies.errors import TrunkError

logger = logging.getLogger(__name__)

FULL = ("full", "memory", "limit")
"""Kinds of `TrunkError` that pass when others end their sessions."""


def as_api_error(error: Exception) -> ApiError:
    """Return what is said of an error: in full to the log, in words of the trunk to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TrunkError):
        logger.warning("the trunk: %s (%s)", error, error.kind)
        if error.kind in FULL:
            return ApiError(str(error), status=429, kind=BUSY, code="trunk_full")
        return away(str(error))
    logger.error("an answer failed", exc_info=error)
    return internal()
