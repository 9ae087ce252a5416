"""`federation`: Who takes part in a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import one_of, setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class FederationConfig(Section):
    """Who takes part in a round."""

    section: ClassVar[str] = "federation"

    fraction_train: float = setting(1.0, rules.POSITIVE_SHARE)
    fraction_evaluate: float = setting(1.0, rules.SHARE)
    min_clients: int = setting(2, rules.COUNT)
    """Wait until so many nodes are connected; at least so many are sampled."""
    sampling: str = setting("uniform", one_of("uniform", "weighted"))
    """How a cohort is drawn: uniform, or weighted by the clients' training examples."""
    oversample: float = setting(0.0, rules.NOT_NEGATIVE)
    """Ask this share more clients to train than the round needs; it ends with the first answers."""
    quorum: float = setting(0.0, rules.SHARE)
    """Share of the cohort that must answer for a round to count; 0: one client is enough."""
    retries: int = setting(0, rules.COUNT_OR_ZERO)
    """Times a round without quorum is tried again, with a cohort drawn anew."""
    round_timeout: float = setting(3600.0, rules.POSITIVE)
    """Seconds after which a round ends without the clients that have not answered."""
