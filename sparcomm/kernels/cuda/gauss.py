"""Gaussian-k's thresholds on devices: see csrc/gauss.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.kernels.checks_sums import check_gaussian
from sparcomm.kernels.cuda.launch import run

SMALL = 1 << 14  # elements that one block of threads goes through sooner than a device starts several kernels
PARTS = 1024  # as in the text


def gaussian(x: Tensor, z: float, wanted: float, doubt: float, times: int) -> Tensor:
    """Moments, then counts that adjust a threshold."""
    check_gaussian(x)
    n, numbers = x.numel(), (float(wanted), float(doubt))
    state = torch.empty(4, dtype=torch.float64, device=x.device)
    if n <= SMALL:
        run("gauss", "gaussian_small", 1, x, x, n, float(z), *numbers, times, state, grid=1, WORK=x.dtype)
        return state[:2]
    partial = torch.empty((2, PARTS), dtype=torch.float64, device=x.device)
    found = torch.zeros(max(times, 1), dtype=torch.int64, device=x.device)
    run("gauss", "moments", n, x, x, n, partial, grid=PARTS, WORK=x.dtype)
    run("gauss", "begin", 1, x, x, n, float(z), times, partial, state, grid=1, WORK=x.dtype)
    for count in found[:times]:
        run("gauss", "count", n, x, x, n, state, count, each=8, WORK=x.dtype)
        run("gauss", "adjusted", 1, x, state, count, *numbers, grid=1, WORK=x.dtype)
    return state[:2].flip(0)
