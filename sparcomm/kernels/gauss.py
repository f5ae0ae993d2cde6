"""Gaussian-k's threshold in plain torch. Source: Shi et al., arXiv 1911.08772, 2019."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparcomm.kernels.checks_sums import check_gaussian

PIECE = 1 << 14  # elements that stay in a core's cache over several operations


def gaussian(x: Tensor, z: float, wanted: float, doubt: float, times: int) -> Tensor:
    """Moments, then counts that adjust a threshold. The host waits for the device."""
    check_gaussian(x)
    mean, deviation = moments(x)
    magnitude = x.abs()
    counted, threshold = adjusted(
        mean + z * deviation, wanted, doubt, times, lambda t: int((magnitude > t).count_nonzero())
    )
    return torch.tensor([counted, threshold], dtype=torch.float64, device="cpu").to(x.device)


def adjusted(
    threshold: float, wanted: float, doubt: float, times: int, count: Callable[[float], int]
) -> tuple[float, float]:
    """(the threshold last counted, the one that came of it), by the paper's loop.

    ``doubt``: by how much a count must be out of bounds to be believed.
    """
    counted = threshold
    for _ in range(times):
        counted, found = threshold, count(threshold)
        if found < 2 * wanted / 3 - doubt:
            threshold *= 0.5
        elif found > 4 * wanted / 3 + doubt:
            threshold *= 1.5
        else:
            break
    return counted, threshold


def moments(x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, in float64 and one pass; not finite where x is not. The host waits for them."""
    n, step = x.numel(), PIECE if x.device.type == "cpu" else x.numel()
    shift = float(x[0])  # so that what all elements share does not drown what they differ in
    total = square = 0.0
    for start in range(0, n, step):
        part = x[start : start + step].to(torch.float64, copy=True).sub_(shift)
        total += float(part.sum())
        square += float(torch.dot(part, part))
    mean = total / n
    return mean + shift, math.sqrt(max(square / n - mean * mean, 0.0))
