"""Clips what a client has changed in its ends, and adds noise, before they leave it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.utils import get_total_norm

from conf.sections.privacy import PrivacyConfig
from flower_app.client.defences._normal import key_of, normal


def noisy_ends(
    config: PrivacyConfig,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    secret: bytes,
    place: str,
) -> dict[str, Tensor]:
    """What leaves of a client's trained ends: the Gaussian mechanism at the level of clients.

    The update (end - start, over all tensors together) is made no longer than
    `privacy.update_clip` (L2), and each element gets independent normal noise of
    `privacy.update_noise` times that. McMahan et al., "Learning Differentially Private Recurrent
    Language Models", 2018; the noise is the client's, and not the server's.

    Parameters
    ----------
    config : PrivacyConfig
        Strengths; `update_clip` of 0: the ends leave as they are.
    start, end : mapping
        The ends as the round began with them, and as they are now. What of `start` is not in `end`
        does not count.
    secret : bytes
        Of this client alone: what noise is made of.
    place : str
        Where in the run: equal updates at two places have unlike noise.
    """
    if not config.update_clip:
        return dict(end)
    # What came from the server is on the CPU, trained ends are where the model is.
    start, end = ({name: t.detach().cpu() for name, t in ends.items()} for ends in (start, end))
    updates = {name: end[name].float() - start[name].float() for name in end}
    length = float(get_total_norm(list(updates.values())))
    share = min(1.0, config.update_clip / length) if length else 1.0
    scale = config.update_noise * config.update_clip
    sent = {}
    for name, update in updates.items():
        changed = update * share
        if scale:
            key = key_of(secret, f"update {place} {name}", update)
            changed += normal(key, update.shape).to(changed) * scale
        sent[name] = (start[name].float() + changed).to(end[name].dtype)
    return sent
