"""Gradient + residual, and in the same pass the positions that are likely to be among the largest of each block.

The pass is bound by memory. What comes on top is a comparison with each block's floor, a magnitude that, going by a
sample of the block, somewhat more positions reach than will be asked for. Whether enough do is known only later, when
what others sent has been merged: then either the list holds all that is needed, or the block is looked through again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._jit import PIECE, bare, copy, fence, fetch, jit, ones, reaching, span, trailing_zeros, widen
from sparcomm.kernels.cpu._select import kth, stored_in

NONFINITE = wire.NONFINITE
OVERFLOW = 1 << 40  # length of a list that would not have fitted
GROUP = 2  # positions written at a time: without a branch per position, of which many would be guessed wrong
SHARE = 256  # of a block's positions one in so many is sampled,
FEWEST = 1 << 10  # but at least so many in a block,
SAMPLES = 1 << 15  # and at most so many in all blocks

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
    return math.ceil(share * stored) + PIECE + GROUP


@jit
def floors(
    grad: Any, residual: Any, slot: Any, tile: int, numel: int, place: int, drawn: Any, bits: Any, floor: Any
) -> None:
    """Every block's floor: the ``place``-th largest magnitude of a sample. 0 lets everything in, 1 all but zeros.

    ``drawn``: room for a sample; ``bits``: the same as int32 or int64.
    """
    for b in range(floor.size):
        stored = stored_in(slot, b, tile, numel)
        if place >= drawn.size or stored < drawn.size:
            floor[b] = 0
        else:
            sample(grad, residual, slot, b, tile, stored, drawn)
            floor[b] = max(kth(bits, place)[0], 1)


@jit
def sample(grad: Any, residual: Any, slot: Any, block: int, tile: int, stored: int, out: Any) -> None:
    """Values of gradient + residual at ``out.size`` (a power of two) places of a block, one in each equal share."""
    blocks = slot.shape[1]
    share = stored // out.size
    for i in range(out.size):
        # Not at equal distances, which a periodic gradient could fall in step with.
        chance = np.int64((U(i) * U(0x9E3779B97F4A7C15)) >> U(40))
        at = i * share + ((chance * share) >> 24)
        r = at // tile
        j = (r * blocks + slot[r, block]) * tile + at - r * tile
        out[i] = widen(grad[j]) if residual is None else widen(grad[j]) + residual[j]


@jit
def compensate(
    grad: Any, residual: Any, out: Any, owner: Any, tile: int, floor: Any, index: Any, value: Any, found: Any,
    streaming: bool,
) -> None:  # fmt: skip
    """Writes grad + residual to ``out``, and each block's positions whose magnitude is at least its floor to its list.

    ``owner``: (rounds, blocks). ``floor``: (blocks,) int32 or int64. ``index``, ``value``: (blocks, room), of which
    ``found`` (blocks,), zeros, become valid; OVERFLOW where there are too many.
    """
    rounds, blocks = owner.shape
    room = np.empty(PIECE, out.dtype)
    # Copied to out from here: what was just written there cannot be read again before memory has answered.
    scratch, bits = bare(room), bare(room.view(floor.dtype))
    for t in range(rounds * blocks):
        b = owner[t // blocks, t % blocks]
        start = t * tile
        stop = min(start + tile, out.size)
        for lo in range(start, stop, PIECE):
            size = min(PIECE, stop - lo)
            put(span(grad, lo, size), span(residual, lo, size), span(scratch, 0, size))
            copy(scratch, out, lo, size, streaming)
            fetch(grad, lo + PIECE, PIECE)
            fetch(residual, lo + PIECE, PIECE)
            if found[b] + size + GROUP <= index.shape[1]:
                local = (t // blocks) * tile + lo - start
                found[b] = collect(
                    span(bits, 0, size), scratch, floor[b], local, bare(index)[b], bare(value)[b], found[b]
                )
            else:
                found[b] = OVERFLOW
    if streaming:
        fence()
    room[0] = 0  # alive until here


@jit
def infinity(bits: Any) -> int:
    """The bits of infinity, as an array's dtype has them."""
    return 0x7F800000 if bits.itemsize == 4 else 0x7FF0000000000000


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
def peak(bits: Any) -> Any:
    """The largest magnitude."""
    mask = np.iinfo(bits.dtype).max
    largest = bits.dtype.type(0)
    for i in range(bits.size):
        largest = max(largest, bits.dtype.type(bits[i] & mask))
    return largest


@jit
def collect(bits: Any, real: Any, floor: Any, local: int, index: Any, value: Any, found: int) -> int:
    """Appends positions (from ``local`` on) and values whose magnitude is at least ``floor`` to a list."""
    mask = bits.dtype.type(np.iinfo(bits.dtype).max)
    even = bits.size // 64 * 64
    for i in range(0, even, 64):
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
