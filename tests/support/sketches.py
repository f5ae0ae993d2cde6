"""Sketches by their definition, one key and one cell at a time, in Python's integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def mix(w: int) -> int:
    """The bijection that all hashes are made of."""
    w = ((w ^ (w >> 16)) * 0x7FEB352D) & MASK
    w = ((w ^ (w >> 15)) * 0x846CA68B) & MASK
    return w ^ (w >> 16)


def hashed(key: int, row: int, seed: int, columns: int) -> tuple[int, int]:
    """Bucket and sign of a key in a row."""
    mixed = mix((seed + row * 0x9E3779B9) & MASK)
    word = mix((mix(key ^ mixed) + mixed) & MASK)
    return word * columns >> 32, -1 if word & 1 else 1


def keys(k: int, seed: int = 0, below: int = 1 << 32) -> Tensor:
    """k keys at random, strictly increasing."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, below, (2 * k + 8,), generator=g, device="cpu").unique()[torch.arange(k, device="cpu") * 2]


def integers(k: int, seed: int = 0, bits: int = 32) -> Tensor:
    """k int32 numbers at random, of so many bits with the sign."""
    g = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (k,), generator=g, device="cpu").to(torch.int32)


def table_of(
    kernels: Any, key: Tensor, value: Tensor, width: int, rows: int, columns: int, seed: int = 7
) -> tuple[Tensor, Tensor]:
    """The table of these keys, and how many of them each bucket holds; both start as rubbish."""
    out = torch.full((rows, columns * width), 3, dtype=value.dtype, device="cpu")
    counts = torch.full((rows, columns), 3, dtype=torch.int32, device="cpu")
    kernels.sketch(key, value, width, seed, out)
    kernels.occupancy(key, seed, columns, counts)
    return out, counts


def every_sketch(kernels: Any, key: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """One call of each kernel of sketches, on three rows; all results."""
    k = key.numel()
    value = torch.linspace(-1, 1, 2 * k, dtype=dtype, device="cpu")
    fixed = torch.empty(2 * k, dtype=torch.int32, device="cpu")
    beyond = kernels.to_fixed(value, -30, 1 << 29, fixed)
    table, counts = table_of(kernels, key, value, 2, 3, k)
    exact, _ = table_of(kernels, key, fixed, 2, 3, k)
    found = [kernels.estimate(table, key, 2, 7, None, how) for how in ("median", "mean")]
    found += [kernels.estimate(table, key, 2, 7, counts, "projection"), counts.clone()]
    found += [*kernels.peel(exact, key, 2, 7, counts), kernels.from_fixed(fixed, -30, dtype)]
    return [*found, table, exact, counts, fixed, beyond]
