"""Loops over hashed keys. Tables are flat here, row after row; buckets are below ``columns`` whatever a key is.

Keys go through in chunks: their words first, in a loop of their own that uses vector instructions, then the accesses
at random, of which the processor keeps many in flight as none waits for another.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm.kernels.cpu._code import mix
from sparcomm.kernels.cpu._jit import jit, prefetch
from sparcomm.kernels.cpu._quantize import noise

CHUNK = 256
BATCH = 64  # cells that peeling looks at together: enough to have their lines fetched, few enough to be cached

U = np.uint64
W = np.uint32


@jit
def seed_of(seed: Any, r: int) -> Any:
    """The seed of a row (uint32), mixed as ``noise`` takes it."""
    return mix(W(seed + W(W(r) * W(0x9E3779B9))))


@jit
def hashed(key: Any, lo: int, size: int, mixed: Any, columns: int, place: Any, odd: Any) -> None:
    """Buckets (uint32) of ``key[lo : lo + size]`` in a row, and 1 (uint32) where the sign is -1."""
    for i in range(size):
        word = noise(key[lo + i], mixed)
        place[i] = W((U(word) * U(columns)) >> U(32))
        odd[i] = word & W(1)


@jit
def sketch(key: Any, value: Any, width: int, mixed: Any, row: Any) -> None:
    """One row of a table (columns * width,), from zeros."""
    columns = row.size // width
    place, odd = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    one = row.dtype.type(1)
    row[:] = 0
    for lo in range(0, key.size, CHUNK):
        size = min(CHUNK, key.size - lo)
        hashed(key, lo, size, mixed, columns, place, odd)
        for i in range(size):
            sign = -one if odd[i] else one
            if width == 1:
                row[place[i]] += sign * value[lo + i]
                continue
            cell, mine = place[i] * width, (lo + i) * width
            for j in range(width):
                row[cell + j] += sign * value[mine + j]


@jit
def occupancy(key: Any, mixed: Any, row: Any) -> None:
    """One row of counts (columns,) int32, from zeros."""
    place, odd = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    row[:] = 0
    for lo in range(0, key.size, CHUNK):
        size = min(CHUNK, key.size - lo)
        hashed(key, lo, size, mixed, row.size, place, odd)
        for i in range(size):
            row[place[i]] += 1


@jit
def mean(
    table: Any, columns: int, key: Any, width: int, seed: Any, counts: Any, first: int, last: int, out: Any
) -> None:
    """Means over rows of sign * cell, over the bucket's count unless ``counts`` is None, of ``key[first:last]``."""
    place, odd = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    shared = np.ones(CHUNK, np.int32)
    rows = table.size // (columns * width)
    kind = out.dtype.type
    for lo in range(first, last, CHUNK):
        size = min(CHUNK, last - lo)
        mine = out[lo * width : (lo + size) * width]
        mine[:] = 0
        for r in range(rows):
            hashed(key, lo, size, seed_of(seed, r), columns, place, odd)
            if counts is not None:
                for i in range(size):
                    shared[i] = counts[r * columns + place[i]]
            row = table[r * columns * width : (r + 1) * columns * width]
            for i in range(size):
                if shared[i] < 1:
                    continue
                sign, share = (-kind(1) if odd[i] else kind(1)), kind(shared[i])
                if width == 1:
                    mine[i] += sign * row[place[i]] / share
                    continue
                cell = place[i] * width
                for j in range(width):
                    mine[i * width + j] += sign * row[cell + j] / share
        if rows > 1:
            for i in range(mine.size):
                mine[i] /= kind(rows)


@jit
def median(table: Any, columns: int, key: Any, width: int, seed: Any, first: int, last: int, out: Any) -> None:
    """Medians over rows of sign * cell, of ``key[first:last]``; NaN counts as largest."""
    rows = table.size // (columns * width)
    kind = out.dtype.type
    place, odd = np.empty((rows, CHUNK), np.uint32), np.empty((rows, CHUNK), np.uint32)
    ordered = np.empty(rows, out.dtype)
    for lo in range(first, last, CHUNK):
        size = min(CHUNK, last - lo)
        for r in range(rows):
            hashed(key, lo, size, seed_of(seed, r), columns, place[r], odd[r])
            for i in range(size):
                prefetch(table, (r * columns + place[r, i]) * width)
        for i in range(size):
            for j in range(width):
                for r in range(rows):
                    high = table[(r * columns + place[r, i]) * width + j]
                    high = -high if odd[r, i] else high
                    moved = False  # all behind the first that is larger; no branch on it, which nobody could guess
                    for s in range(r):
                        low = ordered[s]
                        moved |= (low > high) | (np.isnan(low) & (not np.isnan(high)))
                        ordered[s] = high if moved else low
                        high = low if moved else high
                    ordered[r] = high
                middle = ordered[rows // 2]
                if rows % 2 == 0:
                    middle = (ordered[rows // 2 - 1] + middle) * kind(0.5)
                out[(lo + i) * width + j] = middle


@jit
def peel(table: Any, columns: int, key: Any, width: int, seed: Any, counts: Any, value: Any, done: Any) -> int:
    """Rounds by queues of the cells that have come to hold one key; returns their number.

    A row's queue is worked off before the next row's: so a key is read from the lowest row in which it was alone when
    the round began. Such a cell holds its key only, which nobody else takes anything from. A cell gets into its queue
    once at most, and so all ends, if counts are true; if not, since no queue grows beyond a row.
    """
    rows = counts.size // columns
    cells = members(key, seed, columns, counts)
    queue, tail = singles(cells, columns, rows)
    head, mixed = np.zeros(rows, np.int64), np.empty(rows, np.uint32)
    for r in range(rows):
        mixed[r] = seed_of(seed, r)
    batch, place = np.empty(BATCH, np.int64), np.empty((BATCH, rows), np.int64)
    odd = np.empty((BATCH, rows), np.int64)
    rounds = 0
    while True:
        found, end = 0, tail.copy()
        for r in range(rows):
            for lo in range(head[r], end[r], BATCH):
                some = look(queue[r], cells[r * columns : (r + 1) * columns], lo, min(lo + BATCH, end[r]), key, batch)
                aim(batch, some, key, mixed, columns, width, cells, table, place, odd)
                take(batch, some, r, place, odd, columns, width, table, cells, value, done, queue, tail)
                found += some
            head[r] = end[r]
        if not found:
            break
        rounds += 1
    for i in range(counts.size):
        counts[i] = np.int32(cells[i] >> U(32))
    return rounds


@jit
def members(key: Any, seed: Any, columns: int, counts: Any) -> Any:
    """(counts.size,) uint64: each cell's count in the upper half, in the lower its keys' places under exclusive or."""
    place, odd = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    cells = np.empty(counts.size, np.uint64)
    for i in range(counts.size):
        cells[i] = U(W(counts[i])) << U(32)
    for r in range(counts.size // columns):
        row, mixed = cells[r * columns : (r + 1) * columns], seed_of(seed, r)
        for lo in range(0, key.size, CHUNK):
            size = min(CHUNK, key.size - lo)
            hashed(key, lo, size, mixed, columns, place, odd)
            for i in range(size):
                row[place[i]] ^= U(lo + i)
    return cells


@jit
def singles(cells: Any, columns: int, rows: int) -> Any:
    """(rows, columns + 1) uint32 queues of the cells with one key, and where each ends."""
    queue, tail = np.empty((rows, columns + 1), np.uint32), np.zeros(rows, np.int64)
    for r in range(rows):
        last = 0
        for c in range(columns):
            queue[r, last] = c  # the next one overwrites it unless it counts
            last += (cells[r * columns + c] >> U(32)) == U(1)
        tail[r] = last
    return queue, tail


@jit
def look(queue: Any, row: Any, lo: int, hi: int, key: Any, batch: Any) -> int:
    """Collects the keys of a row's queued cells that still hold one; how many."""
    for i in range(lo, hi):
        prefetch(row, queue[i])
    some = 0
    for i in range(lo, hi):
        cell = row[queue[i]]
        number = np.int64(cell & U(0xFFFFFFFF))
        prefetch(key, number)
        batch[some] = number
        some += ((cell >> U(32)) == U(1)) & (number < key.size)
    return some


@jit
def aim(
    batch: Any, some: int, key: Any, mixed: Any, columns: int, width: int, cells: Any, table: Any, place: Any, odd: Any
) -> None:
    """Finds the cells of the collected keys, and asks for them."""
    for i in range(some):
        for r in range(mixed.size):
            word = noise(key[batch[i]], mixed[r])
            cell = r * columns + np.int64((U(word) * U(columns)) >> U(32))
            place[i, r], odd[i, r] = cell, word & W(1)
            prefetch(cells, cell)
            prefetch(table, cell * width)


@jit
def take(
    batch: Any, some: int, r: int, place: Any, odd: Any, columns: int, width: int, table: Any, cells: Any, value: Any,
    done: Any, queue: Any, tail: Any,
) -> None:  # fmt: skip
    """Reads keys' values in row ``r`` and takes them from all their cells; queues those that hold one key now."""
    for i in range(some):
        number = batch[i]
        done[number] = True
        if width == 1:
            mine = negated(table[place[i, r]], odd[i, r])
            value[number] = mine
            for s in range(tail.size):
                table[place[i, s]] -= negated(mine, odd[i, s])
        else:
            for j in range(width):
                value[number * width + j] = negated(table[place[i, r] * width + j], odd[i, r])
            for s in range(tail.size):
                for j in range(width):
                    table[place[i, s] * width + j] -= negated(value[number * width + j], odd[i, s])
        for s in range(tail.size):
            cell = place[i, s]
            left = (cells[cell] - (U(1) << U(32))) ^ U(number)
            cells[cell] = left
            queue[s, tail[s]] = cell - s * columns
            tail[s] = min(tail[s] + ((left >> U(32)) == U(1)), columns)


@jit
def negated(x: Any, odd: int) -> int:
    """-x where ``odd`` is 1, x where it is 0, without a branch that nobody could guess."""
    return (np.int64(x) ^ -odd) + odd


@jit
def to_fixed(value: Any, scale: float, limit: float, out: Any) -> bool:
    """Writes value * scale, rounded and clamped; whether anything was."""
    beyond = False
    for i in range(value.size):
        x = np.rint(np.float64(value[i]) * scale)
        beyond |= not abs(x) <= limit
        x = x if x == x else 0.0
        out[i] = np.int32(min(max(x, -limit), limit))
    return beyond


@jit
def from_fixed(fixed: Any, scale: float, out: Any) -> None:
    """Writes fixed * scale."""
    for i in range(fixed.size):
        out[i] = np.float64(fixed[i]) * scale
