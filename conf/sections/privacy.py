"""`privacy`: What is done so that less can be read in what leaves a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conf import rules
from conf.rules import ConfigError, one_of, setting
from conf.sections.base import Section

GAUSSIAN = ("clip", "noise", "clip_gradient", "noise_gradient")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Section):
    """What is done so that less can be read in what leaves a client. By default nothing."""

    section: ClassVar[str] = "privacy"

    ends: str = setting("plain", one_of("plain", "masked"))
    """plain: the server sees each client's trained ends, and their average. masked: it sees sums of
    integers under masks from a secret that the sites share (`graft site-key new`)."""
    defence: str = setting("none", rules.NAME)
    """What is done to h1 and dL/dh2: none, gaussian, nopeek, or what flower_app/client/defences
    holds besides."""
    clip: float = setting(0.0, rules.NOT_NEGATIVE)
    """gaussian: longest that h1 of a unit may be (L2); 0: as it is."""
    noise: float = setting(0.0, rules.NOT_NEGATIVE)
    """gaussian: standard deviation of the noise on each element of h1, in multiples of `clip`; of
    the tensor's own standard deviation, if nothing is clipped."""
    clip_gradient: float = setting(0.0, rules.NOT_NEGATIVE)
    """As `clip`, of dL/dh2."""
    noise_gradient: float = setting(0.0, rules.NOT_NEGATIVE)
    """As `noise`, of dL/dh2."""
    unit: str = setting("token", one_of("token", "sequence"))
    """What is clipped: each token's row, or all rows of a sequence together."""
    update_clip: float = setting(0.0, rules.NOT_NEGATIVE)
    """Longest that a client's update of its ends may be in a round (L2, over all tensors); 0: as it
    is."""
    update_noise: float = setting(0.0, rules.NOT_NEGATIVE)
    """Standard deviation of the noise on each element of that update, in multiples of
    `update_clip`."""
    delta: float = setting(1e-5, rules.BETWEEN)
    """At which epsilon is stated."""
    weight: float = setting(0.1, rules.NOT_NEGATIVE)
    """nopeek: of the distance correlation of h1 and the tokens' embeddings, beside the loss."""
    perturb: float = setting(0.0, rules.NOT_NEGATIVE)
    """Standard deviation of vectors that each token's embedding and row of the head are given at
    the clients, made of the site key and the same in all rounds; in multiples of the model's
    `initializer_range`. For `ends=masked`."""

    def _check_together(self) -> None:
        if self.perturb and self.ends != "masked":
            raise ConfigError(
                f"privacy.perturb={self.perturb:g} is made of the sites' key, and the server sees "
                f"through it in the ends of privacy.ends={self.ends}: set privacy.ends=masked, or "
                "privacy.perturb=0",
                key="privacy.perturb",
            )
        for name in GAUSSIAN:
            if getattr(self, name) and self.defence != "gaussian":
                raise ConfigError(
                    f"privacy.{name}={getattr(self, name):g} is for privacy.defence=gaussian, and "
                    f"privacy.defence={self.defence} leaves it out: set privacy.defence=gaussian, "
                    f"or privacy.{name}=0",
                    key=f"privacy.{name}",
                )
        if self.update_noise and not self.update_clip:
            raise ConfigError(
                f"privacy.update_noise={self.update_noise:g} is in multiples of privacy.update_clip"
                ", which is 0: set privacy.update_clip, or privacy.update_noise=0",
                key="privacy.update_noise",
            )
        self._check_used()

    def _check_used(self) -> None:
        """Refuse a defence that changes nothing, and what no defence reads."""
        if self.defence == "gaussian" and not any(getattr(self, name) for name in GAUSSIAN):
            raise ConfigError(
                "privacy.defence=gaussian with privacy.noise=0, privacy.noise_gradient=0, "
                "privacy.clip=0 and privacy.clip_gradient=0 changes nothing: set privacy.clip and "
                "privacy.noise, or privacy.defence=none",
                key="privacy.noise",
            )
        if self.defence == "nopeek" and not self.weight:
            raise ConfigError(
                "privacy.defence=nopeek with privacy.weight=0 changes nothing: set privacy.weight, "
                "or privacy.defence=none",
                key="privacy.weight",
            )
        for name, others in (("weight", ("none", "gaussian")), ("unit", ("none", "nopeek"))):
            value, usual = getattr(self, name), getattr(PrivacyConfig, name)
            if self.defence in others and value != usual:
                wanted = "nopeek" if name == "weight" else "gaussian"
                raise ConfigError(
                    f"privacy.{name}={value} is for privacy.defence={wanted}, and privacy.defence="
                    f"{self.defence} leaves it out: set privacy.defence={wanted}, or "
                    f"privacy.{name}={usual}",
                    key=f"privacy.{name}",
                )
