"""What an attacker has in a run: which ends, and what becomes of h1 on its way, but for chance.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from conf.schema import Config, PrivacyConfig
from models import Part
from simulations.audit.observation import CLIENT, SERVER, Crossed

BOTTOM, TOP = "bottom", "top"

Sent = Callable[[Tensor], Tensor]


def as_sent(
    config: PrivacyConfig,
    bottom: Part,
    crossed: Sequence[Crossed],
    public: Sequence[Sequence[int]],
) -> tuple[Sent, float]:
    """What the defence does to h1 that is no chance, and the deviation of the noise that it adds.

    Parameters
    ----------
    config : PrivacyConfig
        Of the run: no secret.
    bottom : Part
        As the attacker has it.
    crossed : sequence of Crossed
        What was seen; a client that looks sees nothing.
    public : sequence of sequences of int
        Public text, which says how long h1 usually is.
    """
    if config.defence != "gaussian" or not crossed:
        return lambda h_BTD: h_BTD, 0.0
    if not config.clip:
        seen = torch.cat([h1_TD for each in crossed for h1_TD in each.texts()])
        wide = float(seen.std())
        return lambda h_BTD: h_BTD, wide * config.noise / (1 + config.noise**2) ** 0.5
    noise = config.noise * config.clip
    if config.unit == "token":
        return lambda h_BTD: _clipped(h_BTD, config.clip), noise
    with torch.no_grad(), bottom.device:
        h_BTD = bottom(torch.tensor([list(text) for text in public[:8]]))
    share = float((config.clip / h_BTD.flatten(1).norm(dim=1)).mean().clamp_max(1.0))
    return lambda h_BTD: h_BTD * share, noise


def seen_ends(config: Config, who: str = SERVER) -> set[str]:
    """Which trained ends are seen in a run, of each client by the server, averaged by the others.

    The mask of `privacy.ends=masked` hides them from the server alone.
    """
    if config.privacy.ends != "plain" and who != CLIENT:
        return set()
    return {"average": {BOTTOM, TOP}, "local-top": {BOTTOM}}.get(config.aggregation.ends, set())


def _clipped(h_BTD: Tensor, clip: float) -> Tensor:
    return h_BTD * (clip / h_BTD.norm(dim=-1, keepdim=True)).clamp_max(1.0)
