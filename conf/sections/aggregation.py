"""`aggregation`: How what clients trained becomes one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import ConfigError, one_of, setting
from conf.sections.base import Section


@dataclass(frozen=True, kw_only=True)
class AggregationConfig(Section):
    """How what clients trained becomes one model. Under splitfed-v1 this includes the trunk."""

    section: ClassVar[str] = "aggregation"

    lora: str = setting("factors", rules.NAME)
    """factors (the mean of A and of B), ffa (A is frozen), exact (the mean of B.A; what the rank
    cannot hold goes into the base weights) or svd (the mean of B.A, cut to the rank)."""
    ends: str = setting("average", one_of("average", "local", "local-top"))
    """average: all clients hold the same bottom and top. local: both stay with their client, each
    has its own, and only the trunk is common; local-top: the top stays, the bottom is averaged."""
    optimizer: str = setting("fedavg", one_of("fedavg", "fedavgm", "fedadam", "fedyogi"))
    """fedavg (the mean itself), or a server optimizer: fedavgm, fedadam, fedyogi."""
    lr: float = setting(0.0, rules.NOT_NEGATIVE)
    """Learning rate of the server optimizer; 0: 1 for fedavgm, 0.01 for fedadam and fedyogi."""
    momentum: float = setting(0.9, rules.BELOW_ONE)
    """fedavgm."""
    betas: tuple[float, float] = setting((0.9, 0.99), rules.BETAS)
    """fedadam, fedyogi."""
    tau: float = setting(1e-3, rules.POSITIVE)
    """fedadam, fedyogi: added to the root of the second moment."""
    robust: str = setting("none", rules.NAME)
    """none (the weighted mean), median, trimmed-mean, krum, multi-krum, norm-bound, or what
    strategies/aggregate/robust holds besides: what withstands poisoned updates."""
    byzantine: int = setting(1, rules.COUNT)
    """With `robust`: how many clients of a round may be poisoned."""
    bound: float = setting(1.0, rules.POSITIVE)
    """norm-bound: how far from the coordinates' median a client may be, in multiples of the median
    client's distance."""

    def _check_together(self) -> None:
        if self.lora in ("exact", "svd") and self.optimizer != "fedavg":
            raise ConfigError(
                f"aggregation.lora={self.lora} with aggregation.optimizer="
                f"{self.optimizer}: a server optimizer moves the factors, and their product is "
                "then no mean; set aggregation.optimizer=fedavg, or aggregation.lora=factors or "
                "ffa",
                key="aggregation.optimizer",
            )

        self._check_robust()

    def _check_robust(self) -> None:
        """Refuse what a robust method would have to see, or be believed, otherwise."""
        if self.robust == "none":
            return
        if self.lora in ("exact", "svd"):
            raise ConfigError(
                f"aggregation.robust={self.robust} with aggregation.lora={self.lora}: products of "
                "adapters are averaged as a whole there, of any rank, and factors have no common "
                "coordinates to compare; set aggregation.lora=ffa or factors, or "
                "aggregation.robust=none",
                key="aggregation.robust",
            )
        if self.optimizer != "fedavg":
            raise ConfigError(
                f"aggregation.robust={self.robust} with aggregation.optimizer={self.optimizer}: "
                "a server optimizer scales each coordinate by what it was before, so that the "
                "little that passes is made large again; set aggregation.optimizer=fedavg, or "
                "aggregation.robust=none",
                key="aggregation.robust",
            )

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return self.lr or (1.0 if self.optimizer == "fedavgm" else 0.01)
