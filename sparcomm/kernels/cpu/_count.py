"""The magnitude histogram of a block."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._jit import PIECE, jit, load64, next_piece, prefetch, span

BINS = wire.BINS
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
def histogram(bits: Any, slot: Any, block: int, tile: int, row: Any) -> None:
    """Counts a block's magnitudes by their top 11 bits into ``row``. ``bits``: the vector as uint32 or uint64."""
    rounds, blocks = slot.shape
    lanes = np.zeros(BINS * LANES, np.uint32)
    few = rounds * tile <= FEW
    row[:] = 0
    counted = 0
    for r in range(rounds):
        start = (r * blocks + slot[r, block]) * tile
        stop = min(start + tile, bits.size)
        for lo in range(start, stop, PIECE):
            run = span(bits, lo, min(PIECE, stop - lo))
            if few:
                count_few(run, row)
            else:
                count(run, lanes, bits, next_piece(slot, r, block, tile, lo))
            counted += run.size
            if counted >= FLUSH:
                flush(lanes, row)
                counted = 0
    if not few:
        flush(lanes, row)


@jit
def count(bits: Any, lanes: Any, whole: Any, ahead: int) -> None:
    """Adds the bins of a piece; meanwhile fetches the piece of ``whole`` at ``ahead``.

    Counting takes long enough for memory to be idle, as the hardware looks only a few lines ahead.
    """
    mask = U(LANE_MASK)
    even = bits.size // STEP * STEP
    for i in range(0, even, STEP):
        prefetch(whole, ahead + i)
        if bits.itemsize == 4:
            for j in range(0, STEP, 2):
                two = load64(bits, i + j)
                lanes[((two >> U(17)) & mask) + (U(j) & U(LANES - 1))] += W(1)
                lanes[((two >> U(49)) & mask) + (U(j) & U(LANES - 1)) + U(1)] += W(1)
        else:
            prefetch(whole, ahead + i + STEP // 2)
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
