"""What the trunk refuses of a session, and what it must know of a module."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor, nn

from strategies.errors import TrunkError

LARGEST = 2.0**40
"""Most that an activation, a gradient or a norm may be where clients' numbers are added up."""


class InFlight:
    """How many bytes may wait for the end of their step, over all sessions.

    Parameters
    ----------
    limit : int
        Most bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._taken = limit, 0
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """What waits now."""
        return self._taken

    def take(self, count: int) -> None:
        """Count `count` bytes more; `TrunkError` if they are too many."""
        with self._lock:
            if self._taken + count > self.limit:
                raise TrunkError(
                    f"{self._taken / 2**20:.4g} MiB of activations wait for their step, and "
                    f"{count / 2**20:.4g} more exceed link.max_in_flight_mb="
                    f"{self.limit / 2**20:g}; raise it, or lower train.batch_size, data.context "
                    "or the number of clients in a round",
                    kind="busy",
                )
            self._taken += count

    def give_back(self, count: int) -> None:
        """Count `count` bytes less."""
        with self._lock:
            self._taken -= count


def check_shapes(
    shape: tuple[int, ...],
    mask_shape: tuple[int, ...] | None,
    hidden_size: int,
    max_sequences: int,
    max_tokens: int,
) -> None:
    """Refuse shapes that are not activations (B, T, D) and mask (B, T) within bounds."""
    if len(shape) != 3 or shape[2] != hidden_size or 0 in shape:
        raise TrunkError(
            f"activations have shape {shape}; the trunk takes (B, T, {hidden_size})", kind="shape"
        )
    if shape[0] > max_sequences or shape[1] > max_tokens:
        raise TrunkError(
            f"activations have shape {shape}; at most train.batch_size={max_sequences} "
            f"sequences of data.context={max_tokens} tokens are accepted",
            kind="shape",
        )
    if mask_shape is not None and mask_shape != shape[:2]:
        raise TrunkError(f"mask has shape {mask_shape}, activations {shape}", kind="shape")


def check_finite(
    tensor: Tensor,
    what: str,
    advice: str = "lower train.lr, set train.clip, or use train.precision=fp32",
) -> None:
    if not torch.isfinite(tensor).all():
        raise TrunkError(f"{what} holds values that are not finite; {advice}", kind="not-finite")


def check_bounded(tensor: Tensor, what: str) -> None:
    """Refuse what is not finite, or would drown the numbers of other clients where they meet."""
    check_finite(tensor, what)
    if tensor.numel() and float(tensor.abs().max()) > LARGEST:
        raise TrunkError(
            f"{what} holds values beyond {LARGEST:.3g}; lower train.lr, or set train.clip",
            kind="not-finite",
        )


def check_square(step: int, square: float) -> None:
    """Refuse a squared norm that is none, or would drown those of other clients."""
    if not square >= 0:
        raise TrunkError(f"a square norm cannot be {square}")
    if math.isinf(square):
        raise norm_error(step, square)
    if square > LARGEST**2:
        raise TrunkError(
            f"the square norm {square:.3g} of step {step} is beyond {LARGEST**2:.3g}; lower "
            "train.lr, or set train.clip",
            kind="not-finite",
        )


def norm_error(step: int, norm: float) -> TrunkError:
    return TrunkError(
        f"the gradient norm of step {step} is {norm}; lower train.lr, or set train.clip",
        kind="not-finite",
    )


def has_dropout(module: nn.Module) -> bool:
    """Whether a training forward draws random numbers: from modules, or from a config's rates."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
        return True
    config = getattr(module, "config", None)
    rates = config.to_dict() if config is not None else {}
    return any(
        ("drop" in name or "jitter" in name) and isinstance(rate, float) and rate > 0
        for name, rate in rates.items()
    )
