"""Gradient + residual and the magnitude histogram, in one pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._jit import PIECE, jit, load64, next_piece, prefetch, widen

BINS = wire.BINS
NONFINITE = wire.NONFINITE
# Eight counters per bin, used in turn: neighbours mostly share a bin, and one counter would make every increment
# wait for the store of the one before. They lie side by side, so that few cache lines are hot.
LANES = 8
FLUSH = 1 << 31  # elements after which uint32 counters are emptied

FEW = 4096  # elements of a block up to which emptying the counters would take longer than counting

STEP = 16  # elements per turn of the counting loop: a cache line of float32

U = np.uint64
W = np.uint32
LANE_MASK = (BINS - 1) * LANES


@jit
def tally(grad: Any, residual: Any, out: Any, bits: Any, slot: Any, tile: int, stats: Any, flags: Any) -> None:
    """Writes grad + residual to out (which is left as it is if grad is None), and its histogram to stats.

    ``bits``: out as uint32 or uint64.
    """
    rounds, blocks = slot.shape
    lanes = np.zeros(BINS * LANES, np.uint32)
    nonfinite = np.int64(0)
    few = rounds * tile <= FEW
    for b in range(blocks):
        stats[b, :] = 0
        counted = 0
        for r in range(rounds):
            start = (r * blocks + slot[r, b]) * tile
            stop = min(start + tile, out.size)
            for lo in range(start, stop, PIECE):
                hi = min(lo + PIECE, stop)
                ahead = next_piece(slot, r, b, tile, lo)
                write(grad, residual, out, lo, hi)
                if few:
                    count_few(bits[lo:hi], stats[b])
                elif grad is None:
                    count(bits[lo:hi], lanes, ahead, bits, bits)
                elif residual is None:
                    count(bits[lo:hi], lanes, ahead, bits, grad)
                else:
                    count(bits[lo:hi], lanes, ahead, grad, residual)
                counted += hi - lo
                if counted >= FLUSH:
                    flush(lanes, stats[b])
                    counted = 0
        if not few:
            flush(lanes, stats[b])
        # An exponent of ones: 8 bins of float32, whose bins have 3 bits of mantissa, and 1 of float64.
        for i in range(BINS - 8 if bits.itemsize == 4 else BINS - 1, BINS):
            nonfinite += stats[b, i]
    if nonfinite:
        flags[0] |= NONFINITE


@jit
def write(grad: Any, residual: Any, out: Any, lo: int, hi: int) -> None:
    """Writes grad + residual, whichever there are, to out[lo:hi]."""
    # Slices, because an index that counts from 0 is known not to be negative: no test per element.
    if residual is not None:
        add(grad[lo:hi], residual[lo:hi], out[lo:hi])
    elif grad is not None:
        copy(grad[lo:hi], out[lo:hi])


@jit
def copy(grad: Any, out: Any) -> None:
    """Writes grad to out."""
    for i in range(out.size):
        out[i] = widen(grad[i])


@jit
def add(grad: Any, residual: Any, out: Any) -> None:
    """Writes grad + residual to out."""
    for i in range(out.size):
        out[i] = widen(grad[i]) + residual[i]


@jit
def count(bits: Any, lanes: Any, ahead: int, one: Any, other: Any) -> None:
    """Adds the bins of a piece; meanwhile fetches the piece at ``ahead`` of two arrays.

    Counting takes long enough for memory to be idle, as the hardware looks only a few lines ahead.
    """
    mask = U(LANE_MASK)
    even = bits.size // STEP * STEP
    for i in range(0, even, STEP):
        prefetch(one, ahead + i)
        prefetch(other, ahead + i)
        if bits.itemsize == 4:
            for j in range(0, STEP, 2):
                two = load64(bits, i + j)
                lanes[((two >> U(17)) & mask) + (U(j) & U(LANES - 1))] += W(1)
                lanes[((two >> U(49)) & mask) + (U(j) & U(LANES - 1)) + U(1)] += W(1)
        else:
            prefetch(one, ahead + i + STEP // 2)
            prefetch(other, ahead + i + STEP // 2)
            for j in range(STEP):
                lanes[((bits[i + j] >> U(49)) & mask) + (U(j) & U(LANES - 1))] += W(1)
    for i in range(even, bits.size):
        lanes[(U(bits[i]) >> U(17 if bits.itemsize == 4 else 49)) & mask] += W(1)


@jit
def count_few(bits: Any, row: Any) -> None:
    """Adds the bins of a piece to a row of the statistics."""
    for i in range(bits.size):
        row[(U(bits[i]) >> U(20 if bits.itemsize == 4 else 52)) & U(BINS - 1)] += 1


@jit
def flush(lanes: Any, row: Any) -> None:
    """Moves the counters into a row of the statistics."""
    for i in range(row.size):
        total = np.int64(0)
        for j in range(LANES):
            total += lanes[i * LANES + j]
            lanes[i * LANES + j] = 0
        row[i] += total
