"""Gradient + residual, and in the same pass the positions that are likely to be among the largest of each block.

The pass is bound by memory. What comes on top is a comparison with each block's floor, a magnitude that, going by a
sample of the block, somewhat more positions reach than will be asked for. Whether enough do is known only later, when
what others sent has been merged: then either the list holds all that is needed, or the block is looked through again.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from sparcomm.kernels.cpu._jit import PIECE, bare, copy, fence, fetch, jit, ones, reaching, span, trailing_zeros, widen
from sparcomm.kernels.cpu._select import infinity, kth, peak, stored_in

OVERFLOW = 1 << 40  # length of a list that would not have fitted
GROUP = 2  # positions written at a time: without a branch per position, of which many would be guessed wrong
LEAST = PIECE + GROUP  # places that have to be free in a list for it to be added to
AHEAD = 4 * PIECE  # how far before it is looked at a vector is asked for
SHARE = 256  # of a block's positions one in so many is sampled,
FEWEST = 1 << 10  # but at least so many in a block,
SAMPLES = 1 << 14  # and at most so many in all blocks

U = np.uint64


def samples(stored: int, blocks: int) -> int:
    """How many places of a block to look at: a power of two."""
    return 1 << max(min(stored // SHARE, SAMPLES // blocks), FEWEST).bit_length() - 1


def rank(k: int, stored: int, size: int) -> int:
    """Which of ``size`` sampled magnitudes, from the largest, is a floor that k of ``stored`` reach almost surely.

    How many of the k largest are in the sample varies by the root of their expected number: four times that is added.
    """
    expected = size * k / max(stored, 1)
    return math.ceil(expected + 4 * math.sqrt(expected)) + 4


def capacity(k: int, stored: int, size: int) -> int:
    """Places for what reaches that floor, almost surely."""
    place = rank(k, stored, size)
    share = min(1.0, (place + 6 * math.sqrt(place) + 8) / size)
    return math.ceil(share * stored) + LEAST


@functools.lru_cache(1024)
def plan(k: int, stored: int, blocks: int) -> tuple[int, int, int]:
    """How many places of each block to look at, the floor's rank among them, and places for what reaches it."""
    size = samples(stored, blocks)
    return size, rank(k, stored, size), capacity(k, stored, size)


@jit
def floors(
    grad: Any, residual: Any, slot: Any, tile: int, numel: int, place: int, drawn: Any, bits: Any, floor: Any
) -> None:
    """Every block's floor, where ``floor`` does not say it: the ``place``-th largest magnitude of a sample.

    0 lets everything in, 1 all but zeros. What is negative or not finite says nothing.

    ``drawn``: room for a sample; ``bits``: the same as int32 or int64.
    """
    for b in range(floor.size):
        if 0 <= floor[b] < infinity(floor):
            floor[b] = max(floor[b], 1)
            continue
        stored = stored_in(slot, b, tile, numel)
        if place >= drawn.size or stored < drawn.size:
            floor[b] = 0
        else:
            sample(grad, residual, slot, b, tile, stored, drawn)
            floor[b] = max(kth(bits, place, 0)[0], 1)


@jit
def sample(grad: Any, residual: Any, slot: Any, block: int, tile: int, stored: int, out: Any) -> None:
    """Values of gradient + residual at ``out.size`` (a power of two) places of a block, one in each equal share."""
    blocks = slot.shape[1]
    power = trailing_zeros(U(out.size))
    share, rest = stored // out.size, stored % out.size
    r, lo, hi, base = 0, 0, 0, 0  # the current tile's places in the block
    for i in range(out.size):
        # Not at equal distances, which a periodic gradient could fall in step with.
        chance = np.int64((U(i) * U(0x9E3779B97F4A7C15)) >> U(40))
        at = i * share + ((i * rest + ((chance * stored) >> 24)) >> power)
        if at < lo or at >= hi:
            r = at // tile
            lo, hi = r * tile, (r + 1) * tile
            base = (r * blocks + slot[r, block]) * tile - lo
        out[i] = widen(grad[base + at]) if residual is None else widen(grad[base + at]) + residual[base + at]


@jit
def compensate(
    grad: Any, residual: Any, out: Any, owner: Any, tile: int, floor: Any, index: Any, value: Any, found: Any,
    first: int, last: int, streaming: bool,
) -> bool:  # fmt: skip
    """Writes grad + residual to ``out``, and each block's positions whose magnitude is at least its floor to its list.

    ``owner``: (rounds, blocks). ``floor``: (blocks,) int32 or int64. ``index``, ``value``: (blocks, room), of which
    ``found`` (blocks,), zeros, become valid; OVERFLOW where there are too many. ``first``, ``last``: the part of the
    vector to be worked on. Returns whether anything in it is inf or NaN.
    """
    blocks = owner.shape[1]
    room = np.empty(PIECE, out.dtype)
    # Copied to out from here: what was just written there cannot be read again before memory has answered.
    scratch, bits = bare(room), bare(room.view(floor.dtype))
    start = first
    while start < last:
        t = start // tile
        b = owner[t // blocks, t % blocks]
        stop = min((t + 1) * tile, last)
        for lo in range(start, stop, PIECE):
            size = min(PIECE, stop - lo)
            fetch(grad, lo + PIECE, PIECE)
            fetch(residual, lo + PIECE, PIECE)
            put(span(grad, lo, size), span(residual, lo, size), span(scratch, 0, size))
            copy(scratch, out, lo, size, streaming)
            if found[b] + size + GROUP <= index.shape[1]:
                local = lo - (t - t // blocks) * tile
                run = span(bits, 0, size)
                found[b] = collect(run, scratch, None, 0, floor[b], local, bare(index)[b], bare(value)[b], found[b])
            else:
                found[b] = OVERFLOW
        start = stop
    if streaming:
        fence()
    room[0] = 0  # alive until here
    return nonfinite(out.view(floor.dtype), first, last, value.view(floor.dtype), found)


@jit
def survey(
    x: Any, bits: Any, owner: Any, tile: int, floor: Any, index: Any, value: Any, found: Any, first: int, last: int
) -> bool:
    """The lists of ``compensate`` for a vector that is there, given once more as int32 or int64."""
    blocks = owner.shape[1]
    start = first
    while start < last:
        t = start // tile
        b = owner[t // blocks, t % blocks]
        stop = min((t + 1) * tile, last)
        for lo in range(start, stop, PIECE):
            size = min(PIECE, stop - lo)
            if found[b] + size + GROUP <= index.shape[1]:
                local = lo - (t - t // blocks) * tile
                run, real = span(bits, lo, size), span(x, lo, size)
                found[b] = collect(
                    run, real, bits, lo + AHEAD, floor[b], local, bare(index)[b], bare(value)[b], found[b]
                )
            else:
                found[b] = OVERFLOW
        start = stop
    return nonfinite(bits, first, last, value.view(floor.dtype), found)


@jit
def nonfinite(bits: Any, first: int, last: int, listed: Any, found: Any) -> bool:
    """Whether anything is inf or NaN in a part of a vector, going by its lists: all such reaches every floor."""
    largest = bits.dtype.type(0)
    for b in range(found.size):
        if found[b] >= OVERFLOW:
            return peak(span(bits, first, last - first)) >= infinity(bits)
        largest = max(largest, peak(span(listed[b], 0, found[b])))
    return largest >= infinity(bits)


@jit
def put(grad: Any, residual: Any, out: Any) -> None:
    """Writes grad, or grad + residual, to out."""
    if residual is None:
        for i in range(out.size):
            out[i] = widen(grad[i])
    else:
        for i in range(out.size):
            out[i] = widen(grad[i]) + residual[i]


@jit
def collect(
    bits: Any, real: Any, whole: Any, ahead: int, floor: Any, local: int, index: Any, value: Any, found: int
) -> int:
    """Appends positions (from ``local`` on) and values whose magnitude is at least ``floor`` to a list.

    Meanwhile asks for ``whole`` from ``ahead`` on, unless it is None.
    """
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    even = bits.size // 64 * 64
    for i in range(0, even, 64):
        fetch(whole, ahead + i, 64)
        word = reaching(bits, i, floor)
        count, done = ones(word), 0
        while True:
            for j in range(GROUP):
                at = i + (trailing_zeros(word) & 63)
                index[found + done + j] = local + at
                value[found + done + j] = real[at]
                word &= word - U(1)
            done += GROUP
            if done >= count:
                break
        found += count
    for i in range(even, bits.size):
        index[found] = local + i
        value[found] = real[i]
        found += (bits[i] & mask) >= floor
    return found
