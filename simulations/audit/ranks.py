"""How well a number tells two kinds apart: AUC, and hits at few false alarms.

Shapes: N cases.
"""

from __future__ import annotations

import numpy as np
from scipy import stats
from torch import Tensor

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]


def auc(scores_N: Tensor, positive_N: Tensor) -> float:
    """Probability that a positive case scores above a negative one; 0.5 of one kind alone."""
    up, down = _apart(scores_N, positive_N)
    if not len(up) or not len(down):
        return 0.5
    return float(stats.mannwhitneyu(up, down).statistic) / (len(up) * len(down))


def hits_at(scores_N: Tensor, positive_N: Tensor, alarms: float) -> float:
    """Share of positive cases above the threshold that lets `alarms` of the negative ones pass."""
    up, down = _apart(scores_N, positive_N)
    if not len(up) or not len(down):
        return alarms
    threshold = np.sort(down)[::-1][int(alarms * len(down))]
    return float((up > threshold).mean())


def _apart(
    scores_N: Tensor, positive_N: Tensor
) -> tuple[
    np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]
]:
    scores, positive = scores_N.double().numpy(), positive_N.bool().numpy()
    return scores[positive], scores[~positive]
