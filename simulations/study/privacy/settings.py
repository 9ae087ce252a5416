"""What the study of privacy compares: defences, codecs and cuts, each with its strengths."""

from __future__ import annotations

from dataclasses import dataclass

from simulations.study.codecs.settings import BASE, Condition, condition


@dataclass(frozen=True)
class Defended:
    """One point of the front."""

    family: str
    """What points are joined in the picture by."""
    strength: str
    """Within it; empty: there is one alone."""
    overrides: str
    """Of the configuration."""
    codec: str = BASE
    """`link.codec`."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return f"{self.family} {self.strength}".strip()


def _noise(noise: float) -> Defended:
    words = f"privacy.defence=gaussian privacy.noise={noise}"
    return Defended("noise on h1", f"{noise:g}", words)


def _both(noise: float) -> Defended:
    words = f"privacy.defence=gaussian privacy.noise={noise} privacy.noise_gradient={noise}"
    return Defended("noise on h1 and dL/dh2", f"{noise:g}", words)


def _nopeek(weight: float) -> Defended:
    return Defended("nopeek", f"{weight:g}", f"privacy.defence=nopeek privacy.weight={weight}")


def _perturb(strength: float) -> Defended:
    words = f"privacy.ends=masked privacy.perturb={strength}"
    return Defended("perturb", f"{strength:g}", words)


NOTHING = Defended("nothing", "", "")

POINTS = (
    NOTHING,
    Defended("codec", "int4", "", "int4"),
    Defended("codec", "int2", "", "int2"),
    Defended("codec", "klt", "", "klt"),
    *(_noise(noise) for noise in (0.1, 0.3, 1.0, 3.0, 10.0)),
    *(_both(noise) for noise in (0.3, 1.0, 3.0)),
    *(_nopeek(weight) for weight in (0.1, 1.0, 10.0)),
    *(_perturb(strength) for strength in (4.0, 10.0)),
    *(Defended("cut below", str(blocks), f"cut.bottom={blocks}") for blocks in (2, 4)),
    Defended("local ends", "", "aggregation.ends=local"),
)
"""In units of the tensor's own standard deviation, where noise has a strength."""


def condition_of(
    point: Defended, model: str, path: str = "", steps: int = 0, device: str = "cpu"
) -> Condition:
    """What is trained with a defence."""
    words = point.overrides
    if device != "cpu":
        words += f" runtime.client_device={device} runtime.trunk_device={device}"
    return condition(model, path=path, steps=steps, overrides=words.strip())
