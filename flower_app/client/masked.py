"""How ends are hidden from the server before they leave, and how the sites read their mean."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import torch
from torch import Tensor

from flower_app.client.site_key import SiteKey
from strategies.aggregate.masked import (
    FRACTION_BITS,
    LARGEST_VALUE,
    MOST_TOKENS,
    NONCE_BYTES,
    Masked,
    MaskedSum,
)

SCALE = 2.0**FRACTION_BITS


def hide(tensors: Mapping[str, Tensor], weight: int, key: SiteKey) -> Masked:
    """Weigh tensors, round them to fixed point and mask them.

    Parameters
    ----------
    tensors : mapping
        By their names in the whole model.
    weight : int
        Tokens that the client trained on.
    key : SiteKey
        The sites' secret.

    Raises
    ------
    ValueError
        If a value or the weight is too large for a sum of 64 bits, or a value is not finite.
    """
    if not 0 < weight < MOST_TOKENS:
        raise ValueError(f"{weight} tokens cannot be the weight of masked ends: set less")
    nonce, hidden = secrets.token_bytes(NONCE_BYTES), {}
    for name, tensor in tensors.items():
        values = tensor.detach().to("cpu", torch.float64)
        _check(name, values, "lower train.lr, or set train.clip or privacy.ends=plain")
        # Exact in float64: 24 bits of a float, 29 of the weight, and a power of two.
        fixed = (values * weight * SCALE).round().to(torch.int64)
        hidden[name] = fixed + _mask(key, nonce, name, fixed)
    return Masked(nonce, key.check, hidden)


def reveal(found: MaskedSum, key: SiteKey) -> dict[str, Tensor]:
    """Read the mean in a sum: fp32.

    Off the exact mean by at most ``K / (2 * weight) * 2**-24``, K clients in the sum, and the
    rounding to fp32; less than 2**-25, for each client has a token.

    Raises
    ------
    ValueError
        If the sum was masked with another key, or holds what cannot be a mean of ends.
    """
    if found.check != key.check:
        raise ValueError(
            f"the ends are masked with another site key (check {found.check.hex()}) than this one "
            f"(check {key.check.hex()}): take the file that the other sites have"
        )
    means = {}
    for name, total in found.tensors.items():
        bare = total.clone()
        for nonce in found.nonces:
            bare -= _mask(key, nonce, name, total)
        values = bare.to(torch.float64) / (SCALE * found.weight)
        _check(name, values, "a client has sent something else than its ends, or the server has")
        means[name] = values.float()
    return means


def _mask(key: SiteKey, nonce: bytes, name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(key.mask(nonce, name, like.numel()).copy()).reshape(like.shape)


def _check(name: str, values: Tensor, why: str) -> None:
    if not torch.isfinite(values).all():
        raise ValueError(f"'{name}' holds a value that is not finite, and cannot be masked: {why}")
    if values.numel() and (most := float(values.abs().max())) >= LARGEST_VALUE:
        raise ValueError(
            f"'{name}' holds {most:.3g}; masked ends are smaller than {LARGEST_VALUE:g}: {why}"
        )
