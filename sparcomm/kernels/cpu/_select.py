"""Exact top-k: of a list of candidates by radix, and of a whole block where the list does not hold enough of them.

No sort and no partition. A block is counted, and what lies at or above the boundary bin is compacted: 64 comparisons at
a time give one word, whose ones are visited; at low density nearly every word is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels.cpu._jit import (
    PIECE,
    fetch,
    jit,
    leading_zeros,
    next_piece,
    prefetch,
    reaching,
    span,
    trailing_zeros,
)

BINS = wire.BINS
DIGIT = 11  # bits per refinement
FEW, FEW_DIGIT = 4096, 6  # of few magnitudes it takes more but smaller ones
LANES = 4
STALE = -1

U = np.uint64
W = np.uint32


@jit
def boundary(row: Any, above: int, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, given ``above`` larger than all bins, and how many lie above that bin."""
    b = row.size - 1
    while b > 0 and above + row[b] < k:
        above += row[b]
        b -= 1
    return b, above


@jit
def infinity(bits: Any) -> int:
    """The bits of infinity, as an array's dtype has them."""
    return 0x7F800000 if bits.itemsize == 4 else 0x7FF0000000000000


@jit
def peak(bits: Any) -> Any:
    """The largest magnitude."""
    mask = np.iinfo(bits.dtype).max
    largest = bits.dtype.type(0)
    for i in range(bits.size):
        largest = max(largest, bits.dtype.type(bits[i] & mask))
    return largest


@jit
def kth(bits: Any, k: int, least: int) -> tuple[int, int]:
    """The k-th largest magnitude, k >= 1, and how many are larger; -1 if fewer than k are at least ``least``.

    By radix, but from the smallest to the largest that there is: so the first digit mostly leaves few.
    """
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    few = bits.size < FEW
    digit, lanes = (FEW_DIGIT, 1) if few else (DIGIT, LANES)
    rows = np.empty((lanes, (1 << digit) + 1), np.uint32)
    lowest, highest, above = least, np.int64(peak(bits)), 0
    pool = bits
    while True:
        shift = max(0, 64 - leading_zeros(U(max(highest - lowest, 0))) - digit)
        bins = 1 << digit
        rows[:] = 0
        for i in range(pool.size):
            # What is outside is counted in a bin of its own, without a branch; neighbours in different lanes.
            key = np.int64(pool[i] & mask)
            place = (key - lowest) >> shift if lowest <= key <= highest else bins
            rows[i & (lanes - 1), place] += W(1)
        row = np.zeros(bins, np.int64)
        for lane in range(lanes):
            for i in range(bins):
                row[i] += rows[lane, i]
        if above + row.sum() < k:
            return -1, 0
        at, above = boundary(row, above, k)
        lowest += at << shift
        highest = min(highest, lowest + (1 << shift) - 1)
        if shift == 0:
            return lowest, above
        left = np.empty(row[at] + 1, bits.dtype)
        found = 0
        for i in range(pool.size):
            key = pool[i] & mask
            left[found] = key
            found += lowest <= key <= highest
        pool = left[:found]


@jit
def places(bits: Any, least: int, above: int, out: Any) -> bool:
    """Places in a list of its out.size largest, ties to the first, given what ``kth`` says; False if it is not true."""
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    ties, found, i = out.size - above, 0, 0
    while found < out.size and i < bits.size:
        key = bits[i] & mask
        tie = key == least
        out[found] = i
        found += key > least or (tie and ties > 0)
        ties -= tie
        i += 1
    return found == out.size


@jit
def choose(index: Any, value: Any, bits: Any, floor: int, index_out: Any, value_out: Any, place: Any) -> bool:
    """Writes the k = place.size largest of a sorted list, ties to the first, and their places in the list.

    False if fewer than k reach ``floor``. ``bits``: value as int32 or int64.
    """
    if place.size == 0:
        return True
    least, above = kth(bits, place.size, floor)
    if least < 0 or not places(bits, least, above, place):
        return False
    for i in range(place.size):
        index_out[i] = index[place[i]]
        value_out[i] = value[place[i]]
    return True


@jit
def top_places(bits: Any, out: Any) -> bool:
    """Places of the out.size largest of a list, ties to the first."""
    if out.size == 0:
        return True
    least, above = kth(bits, out.size, 0)
    return places(bits, least, above, out)


@jit
def reach(bits: Any, least: int) -> int:
    """How many magnitudes are at least ``least``."""
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    count = 0
    for i in range(bits.size):
        count += (bits[i] & mask) >= least
    return count


@jit
def reach_in(bits: Any, least: Any, slot: Any, block: int, tile: int) -> int:
    """How many of a block's magnitudes are at least ``least``."""
    blocks, count = slot.shape[1], 0
    for r in range(slot.shape[0]):
        start = (r * blocks + slot[r, block]) * tile
        for lo in range(start, min(start + tile, bits.size), PIECE):
            fetch(bits, next_piece(slot, r, block, tile, lo), PIECE)
            count += reach(span(bits, lo, min(PIECE, start + tile - lo, bits.size - lo)), least)
    return count


@jit
def first(bits: Any, least: Any, slot: Any, block: int, tile: int, out: Any) -> int:
    """The first positions of a block whose magnitude is at least ``least``: as many as fit in ``out`` less 64."""
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    blocks, found = slot.shape[1], 0
    for r in range(slot.shape[0]):
        start = (r * blocks + slot[r, block]) * tile
        for lo in range(start, min(start + tile, bits.size), PIECE):
            fetch(bits, next_piece(slot, r, block, tile, lo), PIECE)
            local = r * tile + lo - start
            run = span(bits, lo, min(PIECE, start + tile - lo, bits.size - lo))
            vector = run.size // 64 * 64
            for i in range(0, vector, 64):
                word = reaching(run, i, least)
                while word:
                    out[found] = local + i + trailing_zeros(word)
                    found += 1
                    word &= word - U(1)
                if found + 64 >= out.size:
                    return found
            for i in range(vector, run.size):
                out[found] = local + i
                found += (run[i] & mask) >= least
            if found + 64 >= out.size:
                return found
    return found


@jit
def fill_to(index: Any, bits: Any, least: int, k: int, stored: int) -> int:
    """Below which position all have to be taken, so that together with those that reach ``least`` there are k.

    ``index``, ``bits``: a sorted list of all that reach it, or of at least the first k. 0 if there are as many.
    """
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    end = k - reach(bits, least)
    if end <= 0:
        return 0
    for i in range(index.size):
        if index[i] >= end:
            break
        end += (bits[i] & mask) >= least
    return min(end, stored)


@jit
def take(index: Any, value: Any, bits: Any, least: int, end: int, index_out: Any, value_out: Any, place: Any) -> int:
    """Writes the first place.size of a list that reach ``least``, or lie below ``end``: these as zeros. How many."""
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    found = i = 0
    while found < place.size and i < index.size:
        reached = (bits[i] & mask) >= least
        index_out[found] = index[i]
        value_out[found] = value[i] if reached else 0
        place[found] = i
        found += reached or index[i] < end
        i += 1
    return found


@jit
def count_digit(bits: Any, mask: Any, prefix: Any, shift: int, width: int, slot: Any, block: int, tile: int) -> Any:
    """Histogram of the ``width`` bits below ``shift`` of those elements of a block whose upper bits are prefix."""
    blocks = slot.shape[1]
    # Many elements share a digit here, so neighbours count in different places, as in the first histogram.
    lanes = np.zeros((1 << width, LANES), np.int64)
    digit = (1 << width) - 1
    for r in range(slot.shape[0]):
        start = (r * blocks + slot[r, block]) * tile
        run = bits[start : start + tile]
        for i in range(run.size):
            key = run[i] & mask
            lanes[(key >> (shift - width)) & digit, i & (LANES - 1)] += key >> shift == prefix
    return lanes.sum(axis=1)


@jit
def compact(bits: Any, mask: Any, least: Any, slot: Any, block: int, tile: int, out: Any, key: Any) -> int:
    """Local positions and magnitude bits of a block's elements >= least; how many, or STALE if there is no room.

    ``out`` and ``key`` need 64 places more than there are positions.
    """
    blocks = slot.shape[1]
    line = 64 // bits.itemsize
    found = 0
    for r in range(slot.shape[0]):
        start = (r * blocks + slot[r, block]) * tile
        for lo in range(start, min(start + tile, bits.size), PIECE):
            ahead = next_piece(slot, r, block, tile, lo)
            local = r * tile + lo - start
            run = span(bits, lo, min(PIECE, start + tile - lo, bits.size - lo))
            vector = run.size // 64 * 64
            for i in range(0, vector, 64):
                for j in range(0, 64, line):
                    prefetch(bits, ahead + i + j)
                word = reaching(run, i, least)
                if word and found + 64 > out.size:
                    return STALE
                while word:
                    one = i + trailing_zeros(word)
                    out[found] = local + one
                    key[found] = run[one] & mask
                    found += 1
                    word &= word - U(1)
            if found + 64 > out.size:
                return STALE
            for i in range(vector, run.size):
                out[found] = local + i
                key[found] = run[i] & mask
                found += key[found] >= least
    return found


@jit
def add_ties(bits: Any, mask: Any, least: Any, greater: Any, slot: Any, block: int, tile: int, out: Any) -> int:
    """Merges sorted positions ``greater`` with the first ones whose magnitude is ``least``, until out is full."""
    blocks = slot.shape[1]
    ties = out.size - greater.size
    found = g = 0
    for r in range(slot.shape[0]):
        if not ties:
            break
        start = (r * blocks + slot[r, block]) * tile
        run = bits[start : start + tile]
        for i in range(run.size):
            if run[i] & mask == least and ties:
                while g < greater.size and greater[g] < r * tile + i:
                    out[found] = greater[g]
                    g, found = g + 1, found + 1
                out[found] = r * tile + i
                ties, found = ties - 1, found + 1
                if not ties:
                    break
    while g < greater.size:
        out[found] = greater[g]
        g, found = g + 1, found + 1
    return found


@jit
def cut(key: Any, index: Any, prefix: int, shift: int, above: int, out: Any) -> int:
    """Of sorted candidates keeps the out.size largest: settles the bits below shift, then the ties.

    ``prefix``: bits above ``shift`` of the smallest one kept; ``above``: how many exceed it in these bits.
    """
    row = np.empty(1 << DIGIT, np.int64)
    while shift > 0:
        width = min(shift, DIGIT)
        shift -= width
        row[:] = 0
        for i in range(key.size):
            row[(key[i] >> shift) & ((1 << width) - 1)] += key[i] >> (shift + width) == prefix
        digit, above = boundary(row, above, out.size)
        prefix = (prefix << width) | digit
    ties = out.size - above
    found = 0
    for i in range(key.size):
        tie = key[i] == prefix and ties > 0
        if (tie or key[i] > prefix) and found < out.size:
            ties -= tie
            out[found] = index[i]
            found += 1
    return found


@jit
def stored_in(slot: Any, block: int, tile: int, numel: int) -> int:
    """Elements of a block, without padding, which only its last tile has."""
    rounds, blocks = slot.shape
    if not rounds:
        return 0
    start = ((rounds - 1) * blocks + slot[rounds - 1, block]) * tile
    return (rounds - 1) * tile + min(max(numel - start, 0), tile)


def top(bits: Any, k: int, row: Any, slot: Any, block: int, tile: int) -> Any:
    """(k,) sorted local positions of a whole block's largest.

    ``bits``: the vector as int32 or int64; 0 < k < the block's elements; ``row``: the block's histogram.
    """
    integer = bits.dtype.type
    mask = integer(np.iinfo(bits.dtype).max)
    shift = 8 * bits.itemsize - 1 - DIGIT
    prefix, above = boundary(row, 0, k)
    inside = int(row[prefix])
    # Many zeros, or many equals: rather than collect most of the vector, look at more bits of it first.
    while shift and above + inside > 2 * k + BINS:
        width = min(shift, DIGIT)
        digits = count_digit(bits, mask, integer(prefix), shift, width, slot, block, tile)
        digit, above = boundary(digits, above, k)
        inside = int(digits[digit])
        prefix, shift = (prefix << width) | digit, shift - width
    # With all bits settled only what is greater is collected, and ties are added; else what is greater or equal.
    least, capacity = (prefix << shift, above + inside) if shift else (prefix + 1, above)
    candidates, found = np.empty(capacity + 64, np.int64), 0
    key = np.empty(candidates.size, bits.dtype)
    if capacity:
        found = compact(bits, mask, integer(least), slot, block, tile, candidates, key)
    out = np.empty(k, np.int64)
    if shift:
        found = cut(key[:found], candidates[:found], prefix, shift, above, out)
    else:
        found = add_ties(bits, mask, integer(prefix), candidates[:found], slot, block, tile, out)
    if found != k:
        raise SparcommError("the vector was changed while its largest elements were being selected")
    return out
