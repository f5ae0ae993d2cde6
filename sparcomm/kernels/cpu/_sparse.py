"""Loops over sparse positions: reading, adding, restoring, and the sum of two sorted lists."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._jit import jit, widen

BINS = wire.BINS
NONFINITE = wire.NONFINITE
DAMAGED = wire.DAMAGED
PADDING = -1
OUTSIDE = -2


@jit
def place(index: Any, slot: Any, block: int, tile: int, numel: int) -> Any:
    """Global positions of local ones; PADDING or OUTSIDE (both negative) where there is nothing to touch."""
    rounds, blocks = slot.shape
    out = np.empty(index.size, np.int64)
    lo = hi = base = 0  # the current tile in local positions, and what to add: neighbours mostly share a tile
    for i in range(index.size):
        at = index[i]
        if at < lo or at >= hi:
            if at < 0 or at >= rounds * tile:
                out[i] = OUTSIDE
                continue
            r = at // tile
            lo, hi = r * tile, (r + 1) * tile
            base = (r * blocks + slot[r, block]) * tile - lo
        out[i] = base + at if base + at < numel else PADDING
    return out


@jit
def gather(x: Any, places: Any, out: Any) -> None:
    """Reads x[places], zero where nothing is stored."""
    for i in range(places.size):
        out[i] = x[places[i]] if places[i] >= 0 else 0


@jit
def subtract(x: Any, places: Any, value: Any) -> None:
    """x[places] -= value."""
    for i in range(places.size):
        if places[i] >= 0:
            x[places[i]] -= value[i]


@jit
def scatter(out: Any, places: Any, value: Any) -> None:
    """out[places] = value."""
    for i in range(places.size):
        if places[i] >= 0:
            out[places[i]] = value[i]


@jit
def merge(x: Any, bits: Any, places: Any, value: Any, row: Any, flags: Any) -> None:
    """x[places] += value; moves counts in row (None: no statistics). bits: x as uint32 or uint64."""
    shift = np.uint64(20 if bits.itemsize == 4 else 52)
    mask = np.uint64(BINS - 1)
    for i in range(places.size):
        j = places[i]
        if j < 0:
            if j == OUTSIDE:
                flags[0] |= DAMAGED
            continue
        if row is not None:
            row[(bits[j] >> shift) & mask] -= 1
        x[j] += value[i]
        if row is not None:
            row[(bits[j] >> shift) & mask] += 1
        if not np.isfinite(x[j]):
            flags[0] |= NONFINITE


@jit
def restore(x: Any, grad: Any, residual: Any, index: Any, places: Any, keep: Any) -> None:
    """Writes grad + residual at places whose index is not in keep."""
    q = 0
    for i in range(index.size):
        while q < keep.size and keep[q] < index[i]:
            q += 1
        j = places[i]
        if j < 0 or (q < keep.size and keep[q] == index[i]):
            continue
        if residual is None:
            x[j] = widen(grad[j])
        else:
            x[j] = widen(grad[j]) + residual[j]


@jit
def merge_sum(ia: Any, va: Any, ib: Any, vb: Any, index: Any, value: Any) -> int:
    """Merges two sorted lists into (index, value), which have room for both; how many there are."""
    a = b = found = 0
    while a < ia.size and b < ib.size:
        if ia[a] < ib[b]:
            index[found], value[found] = ia[a], va[a]
            a += 1
        elif ib[b] < ia[a]:
            index[found], value[found] = ib[b], vb[b]
            b += 1
        else:
            index[found], value[found] = ia[a], va[a] + vb[b]
            a += 1
            b += 1
        found += 1
    for i in range(a, ia.size):
        index[found], value[found] = ia[i], va[i]
        found += 1
    for i in range(b, ib.size):
        index[found], value[found] = ib[i], vb[i]
        found += 1
    return found
