"""The defence `gaussian`: h1 and dL/dh2 clipped, with normal noise added."""

from __future__ import annotations

import torch
from torch import Tensor

from flower_app.client.defences._normal import key_of, normal
from flower_app.client.defences.defence import Defence


class Gaussian(Defence):
    """The Gaussian mechanism on what crosses the cuts, at the client.

    Each unit (a token's row, or all rows of a sequence) is made no longer than the clip, then every
    element gets independent normal noise. Where nothing is clipped the noise is relative to the
    tensor, and no epsilon can be stated: one value far from the others moves the scale.

    References
    ----------
    Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A.
    """

    name = "gaussian"

    def up(self, h1_BTD: Tensor, mask_BT: Tensor | None, place: str = "") -> Tensor:
        """See `Defence.up`."""
        clip, noise = self.config.clip, self.config.noise
        return self._noisy(h1_BTD, mask_BT, f"h1 {place}", clip, noise)

    def back(self, grad_BTD: Tensor, mask_BT: Tensor | None, place: str = "") -> Tensor:
        """See `Defence.back`."""
        clip, noise = self.config.clip_gradient, self.config.noise_gradient
        return self._noisy(grad_BTD, mask_BT, f"dL/dh2 {place}", clip, noise)

    def _noisy(
        self, tensor_BTD: Tensor, mask_BT: Tensor | None, where: str, clip: float, noise: float
    ) -> Tensor:
        clipped_BTD = clipped(tensor_BTD, mask_BT, clip, self.config.unit) if clip else tensor_BTD
        if not noise:
            return clipped_BTD
        values = tensor_BTD.detach()
        if mask_BT is not None:
            values = values[mask_BT.bool()]
        scale = noise * (clip or float(values.float().std()))
        return clipped_BTD + self._drawn(tensor_BTD.detach(), mask_BT, where) * scale

    def _drawn(self, tensor_BTD: Tensor, mask_BT: Tensor | None, where: str) -> Tensor:
        """Noise for each sequence by itself, so that padding, which does not travel, changes
        nothing; two equal sequences have unlike noise."""
        drawn_BTD = torch.zeros_like(tensor_BTD)
        for row, rows_TD in enumerate(tensor_BTD):
            here_T = slice(None) if mask_BT is None else mask_BT[row].bool()
            values_nD = rows_TD[here_T]
            noise_nD = normal(key_of(self.secret, f"{where} {row}", values_nD), values_nD.shape)
            drawn_BTD[row, here_T] = noise_nD.to(drawn_BTD)
        return drawn_BTD


def clipped(tensor_BTD: Tensor, mask_BT: Tensor | None, clip: float, unit: str) -> Tensor:
    """Each unit no longer than `clip`; a shorter one is as it was, to the bit. Differentiable."""
    rows_BTD = tensor_BTD if mask_BT is None else tensor_BTD * mask_BT.to(tensor_BTD)[..., None]
    dims = (2,) if unit == "token" else (1, 2)
    # Of zeros the root has no derivative, and nothing to clip.
    length = rows_BTD.float().square().sum(dims, keepdim=True).clamp_min(1e-30).sqrt()
    share = (clip / length).clamp_max(1.0)
    return tensor_BTD * share.to(tensor_BTD.dtype)
