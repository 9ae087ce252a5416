"""Normal noise that only who has a key can foretell, or tell from other noise.

A generator such as torch's is linear: whoever guesses a text right would see that what is left of
h1 is its output, and so that the guess is right. This is a stream cipher's.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

_HALF = 2.0**-33


def key_of(secret: bytes, where: str, tensor: Tensor) -> bytes:
    """A key for one tensor at one place: the same only for the same values at the same place.

    By its place, two that are equal have unlike noise: else what is sent would be equal, too, and
    would say so, which no epsilon allows. By its values, whoever has a place computed twice with
    other weights never gets two under the same noise, whose difference would be plain.
    """
    data = tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return hmac.digest(secret, hashlib.sha256(data).digest() + where.encode(), "sha256")


def normal(key: bytes, shape: torch.Size) -> Tensor:
    """Standard normal fp32 on the CPU: ChaCha20 (RFC 8439) as uniform numbers of 32 bits, through
    the inverse of the normal distribution, in fp64."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    stream = np.frombuffer(cipher.update(bytes(4 * shape.numel())), "<u4")
    uniform = torch.from_numpy(stream.astype(np.float64)).mul_(2.0**-32).add_(_HALF)
    return torch.special.ndtri(uniform).float().view(shape)
