"""Sums of ends that the server cannot read: fixed-point integers under one-time masks.

A client of weight n sends ``round(n * x * 2**24) + mask``, modulo 2**64. The server adds what it
got; the sites, who share a secret that makes the masks, take those of the sum off it and divide by
the sum of the weights. A mask that is used once hides a tensor perfectly (Shannon 1949), so each
client draws a new number for its own, which travels with it. No two clients have the same one:
under one mask, the difference of ``n * x`` and ``m * y`` would tell what ends are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FRACTION_BITS = 24
LARGEST_VALUE = 2.0**10
"""Of an end's tensor; with `MOST_TOKENS` no sum leaves 63 bits."""
MOST_TOKENS = 2 ** (63 - FRACTION_BITS - 10)
"""Fewer are the weights of a round together."""
NONCE_BYTES, CHECK_BYTES = 32, 8

_MASKED, _NONCES, _WEIGHT, _CHECK = "masked/", "masked-nonces", "masked-weight", "masked-check"


@dataclass(frozen=True)
class Masked:
    """One client's ends as the server has them.

    Parameters
    ----------
    nonce : bytes
        What the mask was made from besides the sites' secret; used once.
    check : bytes
        Of that secret: alike at all sites that have the same, and tells nothing of it.
    tensors : mapping
        int64, by their names in the whole model.
    """

    nonce: bytes
    check: bytes
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class MaskedSum:
    """A round's masked ends added up, and what the sites need to read the mean in it.

    Parameters
    ----------
    tensors : mapping
        int64, modulo 2**64.
    nonces : tuple of bytes
        Of the masks in the sum.
    weight : int
        The sum of the clients' weights.
    check : bytes
        Of the secret that made the masks.
    """

    tensors: Mapping[str, Tensor]
    nonces: tuple[bytes, ...]
    weight: int
    check: bytes

    def told(self) -> dict[str, list[bytes] | int | bytes]:
        """What a message says of the sum it brings."""
        return {"masks": list(self.nonces), "masks-weight": self.weight, "masks-check": self.check}

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors, flat."""
        nonces = [torch.tensor(list(nonce), dtype=torch.uint8) for nonce in self.nonces]
        return {
            **{_MASKED + name: tensor for name, tensor in self.tensors.items()},
            _NONCES: torch.stack(nonces),
            _WEIGHT: torch.tensor(self.weight),
            _CHECK: torch.tensor(list(self.check), dtype=torch.uint8),
        }


def add_up(parts: Sequence[tuple[Masked, float]]) -> MaskedSum:
    """Add masked ends of one form; each comes with its weight, a whole number.

    Raises
    ------
    ValueError
        If two were masked alike, the sites' secrets differ, or their weights could overflow the
        sum.
    """
    nonces = tuple(masked.nonce for masked, _ in parts)
    if len({*nonces}) < len(nonces):
        raise ValueError("two clients used one mask (the same nonce): their ends could be compared")
    first = parts[0][0]
    if any(masked.check != first.check for masked, _ in parts):
        raise ValueError("the clients' ends are masked with different site keys")
    weight = sum(int(weight) for _, weight in parts)
    if weight >= MOST_TOKENS:
        raise ValueError(
            f"a round of {weight} tokens could overflow masked sums, which hold fewer than "
            f"{MOST_TOKENS}: set train.local_steps"
        )
    total = {name: torch.zeros_like(tensor) for name, tensor in first.tensors.items()}
    for masked, _ in parts:
        for name, tensor in masked.tensors.items():
            total[name] += tensor  # int64 wraps around
    return MaskedSum(total, nonces, weight, first.check)


def take_masked(state: Mapping[str, Tensor]) -> tuple[MaskedSum | None, dict[str, Tensor]]:
    """Divide a state into a `MaskedSum.state_dict`, if it holds one, and the rest."""
    rest = {n: t for n, t in state.items() if not n.startswith(_MASKED.rstrip("/"))}
    if _NONCES not in state:
        return None, rest
    found = MaskedSum(
        {n.removeprefix(_MASKED): t for n, t in state.items() if n.startswith(_MASKED)},
        tuple(bytes(row.tolist()) for row in state[_NONCES]),
        int(state[_WEIGHT]),
        bytes(state[_CHECK].tolist()),
    )
    return found, rest
