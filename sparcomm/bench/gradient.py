"""The gradient that is synchronised, and how much of it a step delivers.

Element i of rank r is ``scale[i] * (common[i] + own[r, i]) / sqrt(2)``, both normal: ranks agree on half of the energy,
as ranks that see samples of one distribution do early in training. ``scale`` differs by up to 10x between 20 stretches
of equal length ("layers"). A function of (n, rank, seed) only, so that any rank can work out the exact sum by itself,
and slow links carry nothing for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LAYERS = 20


def gradient(numel: int, rank: int, seed: int) -> Tensor:
    """(numel,) float32 of one rank."""
    return _normal(numel, seed, 0).add_(_normal(numel, seed, rank + 1)).mul_(_scale(numel))


def exact_sum(numel: int, size: int, seed: int) -> Tensor:
    """(numel,) float32: the sum over ranks."""
    total = _normal(numel, seed, 0).mul_(size)
    for rank in range(size):
        total.add_(_normal(numel, seed, rank + 1))
    return total.mul_(_scale(numel))


def captured(total: Tensor, delivered: Tensor, k: int) -> float:
    """Energy that a step has captured, relative to that of the k largest entries of the exact sum.

    Captured is |S|^2 - |S - T|^2 for the exact sum S and the delivered one T: |T|^2 where T is a part of S's entries,
    and less where its entries are wrong.

    Args:
        total: (n,) S.
        delivered: (n,) T; overwritten.
        k: 1 to n.
    """
    energy = _energy(total)
    missed = _energy(delivered.sub_(total))
    best = energy if k >= total.numel() else _energy(total.abs().topk(k, sorted=False).values)
    return (energy - missed) / best if best else 1.0


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _normal(numel: int, seed: int, stream: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed((seed << 20) + stream))


def _scale(numel: int) -> Tensor:
    """One decade over the layers, in an order that is no ramp; includes the 1 / sqrt(2)."""
    order = torch.arange(LAYERS) * 7 % LAYERS
    levels = 10 ** (order / (LAYERS - 1)) / math.sqrt(2)
    return levels.repeat_interleave(-(-numel // LAYERS))[:numel]
