"""Loops over sparse positions: reading, adding, writing out, and sums of sorted lists."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._jit import PIECE, bare, copy, fence, jit

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
def add(x: Any, places: Any, value: Any, flags: Any) -> None:
    """x[places] += value."""
    for i in range(places.size):
        j = places[i]
        if j >= 0:
            x[j] += value[i]
            if not np.isfinite(x[j]):
                flags[0] |= NONFINITE
        elif j == OUTSIDE:
            flags[0] |= DAMAGED


@jit
def absorb(
    index: Any, value: Any, more: Any, extra: Any, x: Any, slot: Any, block: int, tile: int, saturating: bool,
    index_out: Any, value_out: Any, flags: Any,
) -> int:  # fmt: skip
    """Adds ``extra`` at positions ``more`` to a sorted list of positions and sums; how many the result has.

    What is not in the list yet starts from ``x``. If ``saturating``, sums of finite numbers stay finite. The results
    have room for both lists.
    """
    position, own, rest = np.empty(more.size, np.int64), np.empty(more.size, x.dtype), np.empty(more.size, x.dtype)
    places = place(more, slot, block, tile, x.size)
    kept = 0
    for i in range(more.size):
        j = places[i]
        if j >= 0:
            position[kept], own[kept], rest[kept] = more[i], x[j], extra[i]
            kept += 1
        elif j == OUTSIDE:
            flags[0] |= DAMAGED
    a = b = found = 0
    finite = True
    # Without a branch on which list is ahead, which nobody could guess.
    while a < index.size and b < kept:
        here, there, listed, new = index[a], position[b], value[a], own[b]
        left, right = here <= there, there <= here
        start = listed if left else new
        total = plus(start, rest[b], saturating)
        finite &= np.isfinite(total) | (not right)
        index_out[found] = here if left else there
        value_out[found] = total if right else start
        a, b, found = a + left, b + right, found + 1
    for i in range(a, index.size):
        index_out[found], value_out[found] = index[i], value[i]
        found += 1
    for i in range(b, kept):
        total = plus(own[i], rest[i], saturating)
        finite &= np.isfinite(total)
        index_out[found], value_out[found] = position[i], total
        found += 1
    if not finite:
        flags[0] |= NONFINITE
    return found


@jit
def plus(a: Any, b: Any, saturating: bool) -> Any:
    """A + b; if ``saturating``, at most the largest finite value of finite ones."""
    total = a + b
    if saturating and np.isinf(total) and np.isfinite(a) and np.isfinite(b):
        return np.copysign(np.finfo(a).max, total)
    return total


@jit
def change(index: Any, x: Any, slot: Any, block: int, tile: int, sums: Any, least: int) -> int:
    """How many more of a list's positions reach ``least`` with their sums (as int32 or int64) than in ``x``."""
    mask = x.dtype.type(np.iinfo(x.dtype).max)
    places = place(index, slot, block, tile, x.size)
    count = 0
    for i in range(index.size):
        count += ((sums[i] & mask) >= least) - ((x[places[i]] & mask) >= least)
    return count


@jit
def deduct(value: Any, place: Any, less: Any) -> None:
    """value[place] -= less."""
    for i in range(place.size):
        value[place[i]] -= less[i]


@jit
def settle(index: Any, value: Any, wanted: Any, x: Any, slot: Any, block: int, tile: int) -> None:
    """Writes the sums of a sorted list at those of its positions that the sorted ``wanted`` has, too, to ``x``."""
    blocks = slot.shape[1]
    a = b = lo = hi = base = 0
    while a < index.size and b < wanted.size:
        here, there = index[a], wanted[b]
        if here == there:
            if here >= hi:
                r = here // tile
                lo, hi = r * tile, (r + 1) * tile
                base = (r * blocks + slot[r, block]) * tile - lo
            x[base + here] = value[a]
        a, b = a + (here <= there), b + (there <= here)


@jit
def expand(
    out: Any, index: Any, value: Any, bounds: Any, owner: Any, tile: int, first: int, last: int, streaming: bool
) -> None:
    """Writes ``out`` from ``first`` to ``last``: values at their positions, else zeros.

    ``index``, ``value``: the blocks' sorted lists one after the other, block b's from ``bounds[b]`` to
    ``bounds[b + 1]``.
    """
    blocks = owner.shape[1]
    room = np.zeros(PIECE, out.dtype)
    scratch, next_ = bare(room), bounds[:blocks].copy()
    if first:
        t = first // tile
        for b in range(blocks):  # whatever lies in earlier rounds, or earlier in the tile, comes before first
            low = t // blocks * tile + (first - t * tile if owner[t // blocks, t % blocks] == b else 0)
            next_[b] += np.searchsorted(index[bounds[b] : bounds[b + 1]], low)
    start = first
    while start < last:
        t = start // tile
        b = owner[t // blocks, t % blocks]
        stop = min((t + 1) * tile, last)
        for lo in range(start, stop, PIECE):
            size = min(PIECE, stop - lo)
            local = (t // blocks - t) * tile + lo
            at = begin = next_[b]
            while at < bounds[b + 1] and index[at] < local + size:
                if index[at] >= local:
                    scratch[index[at] - local] = value[at]
                at += 1
            copy(scratch, out, lo, size, streaming)
            for i in range(begin, at):
                if index[i] >= local:
                    scratch[index[i] - local] = 0
            next_[b] = at
        start = stop
    if streaming:
        fence()
    room[0] = 0  # alive until here


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
