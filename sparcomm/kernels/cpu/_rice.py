"""Golomb-Rice codes of sorted indices: a tenth shorter than Elias-Fano's, but of a length that depends on the indices.

Source: Rice & Plaunt, "Adaptive variable-length coding for efficient compression of spacecraft television data", 1971.
The low bits of all gaps come first and the unary parts of all after them, where the usual code alternates: as many
bits, but each field can be found without having read the one before. Without low bits this is a bitmap.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._code import field, give_up, increasing, mark, pack
from sparcomm.kernels.cpu._jit import jit, trailing_zeros

HEADER = wire.RICE_HEADER

U = np.uint64
W = np.uint32


@jit
def gaps_of(index: Any) -> Any:
    """index[i] - index[i-1] - 1, with -1 before the first."""
    gaps = np.empty(index.size, np.int64)
    previous = np.int64(-1)
    for i in range(index.size):
        gaps[i] = index[i] - previous - 1
        previous = index[i]
    return gaps


@jit
def saving(gaps: Any, low: int) -> Any:
    """Unary bits that one low bit more than ``low`` saves. It costs k, and saves the less, the more there are."""
    total = U(0)
    for i in range(gaps.size):
        total += ((U(gaps[i]) >> U(low)) + U(1)) >> U(1)
    return np.int64(total)


@jit
def best_low(gaps: Any, guess: int) -> int:
    """The number of low bits that gives the shortest code; the fewest if several do. ``guess`` is where to begin."""
    low = guess
    while saving(gaps, low) > gaps.size:
        low += 1
    while low > 0 and saving(gaps, low - 1) <= gaps.size:
        low -= 1
    return low


@jit
def length(gaps: Any, low: int) -> int:
    """Words of the code."""
    total = U(0)
    for i in range(gaps.size):
        total += U(gaps[i]) >> U(low)
    return (HEADER + gaps.size * (low + 1) + np.int64(total) + 31) // 32


@jit
def encode(index: Any, m: int, guess: int, out: Any) -> int:
    """Returns the words written, or -1 (and nothing is written) unless index increases below m."""
    if not increasing(index, m):
        return -1
    gaps = gaps_of(index)
    low = best_low(gaps, guess)
    used = length(gaps, low)
    out[:used] = 0
    out[0] = low
    pack(gaps, low, out, HEADER)
    at = HEADER + gaps.size * low
    for i in range(gaps.size):
        gaps[i] >>= low
        at += gaps[i]
        mark(out, at)
        at += 1
    return used


@jit
def decode(words: Any, m: int, out: Any, flags: Any) -> None:
    """Reads out.size indices, of which there are neither 0 nor m; 0, 1, ... if words is not what encode writes."""
    if not (words.size > 0 and read_gaps(words, m, np.int64(words[0]) & ((1 << HEADER) - 1), out)):
        give_up(out, flags)


@jit
def read_gaps(words: Any, m: int, low: int, out: Any) -> Any:
    """Whether ``words`` holds just out.size gaps, as encode would write them; out then has the indices."""
    k = out.size
    start = HEADER + k * low
    if start + k > 32 * words.size or m >> low == 0:
        return False
    found, last, index = 0, start - 1, np.int64(-1)
    more = fewer = U(0)  # what one low bit more would save, and what the last one has saved
    for w in range(start >> 5, words.size):
        word = U(words[w])
        if w == start >> 5:
            word &= ~((U(1) << U(start & 31)) - U(1))
        while word:
            one = 32 * w + trailing_zeros(word)
            word &= word - U(1)
            unary = one - last - 1
            if found >= k or unary > m >> low:
                return False
            last = one
            gap = unary << low | np.int64(field(words, HEADER + found * low, low))
            more += (U(unary) + U(1)) >> U(1)
            fewer += ((U(gap) >> U(max(low, 1) - 1)) + U(1)) >> U(1)
            index += gap + 1
            if index >= m:
                return False
            out[found] = index
            found += 1
    if found < k or last >> 5 != words.size - 1:
        return False
    return more <= U(k) and (low == 0 or fewer > U(k))
