"""Statistics of paired runs: two arms that share their seeds."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple


class Interval(NamedTuple):
    """Mean difference and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(base: list[float], arm: list[float]) -> Interval:
    """Mean of ``arm - base`` over pairs with its 95 % interval, from Student's t with one degree less than pairs."""
    from scipy.stats import t

    if len(base) != len(arm) or len(base) < 2:
        raise ValueError(f"needs at least two pairs, got {len(base)} and {len(arm)} values")
    differences = [b - a for a, b in zip(base, arm, strict=True)]
    mean = statistics.fmean(differences)
    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)
