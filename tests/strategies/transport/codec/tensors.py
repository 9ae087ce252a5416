"""Tensors such as cross a cut."""

from __future__ import annotations

import torch
from torch import Tensor


def activations(rows: int = 64, width: int = 576, seed: int = 0) -> Tensor:
    """Heavy tails, a mean row, channels 50 times the others, and a first row 100 times the rest."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, width, generator=generator)
    rows_ND = normal * normal.abs() + torch.randn(width, generator=generator)
    rows_ND[:, [3, width // 2]] += 50 * torch.randn(rows, 2, generator=generator)
    rows_ND[0] *= 10
    rows_ND[0, width - 1] = 100 * rows_ND[1].norm()
    return rows_ND
