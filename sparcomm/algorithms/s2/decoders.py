"""Integers that sum without rounding, and the keys that do not come out of their table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparcomm.algorithms.s2.run import Run

GROWTH = 3  # bits by which values may exceed all of late before integers overflow
LEAST = {torch.float32: -149, torch.float64: -1000}  # exponents: no float32 is finer, and kernels take no smaller ones
MOST = 1000


def capacity(size: int) -> int:
    """The largest magnitude of one rank's integers: ``size`` of them stay within 32 bits."""
    return ((1 << 31) - 1) // size


def unit_exponent(peak: int, size: int, dtype: torch.dtype) -> int:
    """Two to the power of it is the integers' unit, if magnitudes have been below 2^``peak`` of late."""
    return min(max(peak + GROWTH - (capacity(size).bit_length() - 1), LEAST[dtype]), MOST)


def highest(dtype: torch.dtype) -> int:
    """Magnitudes below two to the power of it stay finite when they are rounded to integers and back."""
    return math.frexp(torch.finfo(dtype).max)[1] - 1


def peeled(run: Run, union: Tensor, table: Tensor, fixed: Tensor) -> Tensor:
    """(u * width,) int32: the sums over ranks of the integers of ``union``, exactly. Collective if some do not peel.

    Args:
        table: (rows, columns * width) int32, the sum of all ranks' tables; used up.
        fixed: (k * width,) int32, this rank's own integers.
    """
    width, kernels, columns = run.keys.width, run.kernels, run.plan.columns
    with run.clock.span("code"):
        counts = torch.empty(table.shape[0], columns, dtype=torch.int32, device=table.device)
        kernels.occupancy(union, run.seed, columns, counts)
        total, done, _ = kernels.peel(table, union, width, run.seed, counts)
        stuck = ~done
        if not bool(stuck.any()):
            return total
        mine = run.spread(fixed, union).view(-1, width)[stuck].view(-1)
    total.view(-1, width)[stuck] = run.add_up(mine, union[stuck]).view(-1, width)
    return total
