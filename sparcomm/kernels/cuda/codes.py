"""Codes of sorted indices on devices, and what else needs to know how many ones of a bitmap come before a word.

Encoders trust that indices increase: that only the device knows, and for what it knows nobody waits but in
``rice_encode``, which refuses others. Whatever they are, nothing is written beyond the words given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels.checks import check_bitmap, check_code, check_rice
from sparcomm.kernels.cuda import bitmaps
from sparcomm.kernels.cuda.launch import THREADS, run
from sparcomm.kernels.cuda.pointers import readable, writable

CHUNKS = 1024  # that a list is cut into at most: each block adds up those before its own
STATE = 7  # words, as in csrc/code.cu
BAD, HIGH, LOW, MORE, FEWER, ODD = range(1, 7)


def prefix(words: Tensor) -> Tensor:
    """Ones in all words before each."""
    check_bitmap(None, words)
    out = torch.empty(words.numel(), dtype=torch.int64, device=words.device)
    if words.numel():
        chunk, sums, _ = _count(words, 0)
        _run("prefix", sums, words, words.numel(), chunk, sums, sums.numel(), out)
    return out


def ones(words: Tensor) -> Tensor:
    """Positions of the ones."""
    k = int(bitmaps.popcount(words))
    out = torch.empty(k, dtype=torch.int64, device=words.device)
    if k:
        _decode(words, 0, words[:0], 0, 0, 0, 32 * words.numel(), 32 * words.numel(), out, None)
    return out


def elias_fano_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Low bits verbatim, then a unary bitmap of the high parts."""
    k = index.numel()
    check_code(out, k, m, wire.elias_fano_words(k, m))
    low = wire.low_bits(k, m)
    _encode(index, low, 1, wire.words(k * low), out)


def elias_fano_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of elias_fano_encode, on any bits."""
    check_code(words, k, m, wire.elias_fano_words(k, m))
    words = readable("words", words, torch.int32, words)
    low = wire.low_bits(k, m)
    split = wire.words(k * low)
    out = torch.empty(k, dtype=torch.int64, device=words.device)
    limit = max(0, k + ((m - 1) >> low))
    _decode(words[split:], 0, words[:split], low, 32 * split - k * low, 1, m, limit, out, flags)
    return out


def bitmap_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Bit i % 32 of word i // 32."""
    check_code(out, index.numel(), m, wire.bitmap_words(m))
    _encode(index, 0, 0, 0, out)


def bitmap_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of bitmap_encode, on any bits."""
    check_code(words, k, m, wire.bitmap_words(m))
    words = readable("words", words, torch.int32, words)
    out = torch.empty(k, dtype=torch.int64, device=words.device)
    _decode(words, 0, words[:0], 0, 0, 0, m, m, out, flags)
    return out


def rice_encode(index: Tensor, m: int, out: Tensor) -> int:
    """Low bits of the gaps, then their unary parts."""
    k = index.numel()
    check_rice(k, m, out)
    index = readable("index", index, torch.int64, out)
    writable("out", out, torch.int32, out)
    counts = torch.zeros(65, dtype=torch.int64, device=out.device)
    run("code", "count_gaps", k, counts, index, k, m, m.bit_length(), counts)
    *bits, disorder = counts.tolist()
    if disorder:
        raise SparcommError(f"indices to be coded must be strictly increasing, from 0 to below m={m}")
    if k in (0, m):
        return 0
    # Bit b of a gap is worth 2^(b - low) zeros.
    unary = [sum(count << (b - low) for b, count in enumerate(bits) if b >= low) for low in range(m.bit_length())]
    sizes = [wire.rice_bits(k, zeros, low) for low, zeros in enumerate(unary)]
    low = sizes.index(min(sizes))
    used = wire.words(sizes[low])
    start = wire.RICE_HEADER + k * low
    chunk, sums = _chunks(k, index)
    out[:used].zero_()
    _run("sum_highs", sums, index, k, low, chunk, sums, sums.numel())
    codes = (index, k, low, wire.RICE_HEADER, start, sizes[low])
    _run("rice_encode", sums, *codes, chunk, sums, sums.numel(), out)
    return used


def rice_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of rice_encode, on any number of any bits."""
    check_rice(k, m)
    index = _rice_index(readable("words", words, torch.int32, words), k, m)
    if index is None:
        flags.bitwise_or_(wire.DAMAGED)
        return torch.arange(k, device=words.device)
    return index


def _rice_index(words: Tensor, k: int, m: int) -> Tensor | None:
    """(k,) indices, strictly increasing below m, that ``words`` is the code of; None if it is none."""
    size = words.numel()
    if k in (0, m):
        return None if size else torch.arange(k, device=words.device)
    if not 0 < size <= wire.rice_words(k, m):
        return None
    low = int(words[0]) & ((1 << wire.RICE_HEADER) - 1)
    start = wire.RICE_HEADER + k * low
    if low >= m.bit_length() or start + k > 32 * size:
        return None
    out = torch.empty(k, dtype=torch.int64, device=words.device)
    skip, room = start % 32, 32 * size - start
    state = _decode(words[start // 32 :], skip, words[:0], 0, 0, 0, room, room, out, None)
    chunk, sums = _chunks(k, out)
    fields = (words, wire.RICE_HEADER, low, k)
    _run("rice_sums", sums, *fields, start, size, m, out, chunk, sums, sums.numel(), state)
    _run("rice_indices", sums, *fields, chunk, sums, sums.numel(), state, out)
    found = state.tolist()
    exact = not found[BAD] and not found[ODD] and (found[HIGH] << 30) + found[LOW] + k <= m
    shortest = found[MORE] <= k and (low == 0 or found[FEWER] > k)
    return out if exact and shortest else None


def _encode(index: Tensor, low: int, step: int, split: int, out: Tensor) -> None:
    """Fields of ``low`` bits to out[:split], then a one at each (index >> low) + step * its place."""
    index = readable("index", index, torch.int64, out)
    unary = writable("out", out, torch.int32, out)[split:].zero_()
    k = index.numel()
    run("code", "encode", max(k, split), out, index, k, low, step, out, split, 32 * unary.numel())


def _decode(
    words: Tensor,
    skip: int,
    lows: Tensor,
    low: int,
    unused: int,
    step: int,
    m: int,
    limit: int,
    out: Tensor,
    flags: Tensor | None,
) -> Tensor:
    """What csrc/code.cu says of its ``decode``, for ``words`` that lie behind ``lows``. Returns (STATE,) int64."""
    if flags is not None:
        writable("flags", flags, torch.uint8, words)
    if not words.numel():
        return torch.zeros(STATE, dtype=torch.int64, device=words.device)
    chunk, sums, state = _count(words, skip)
    counted = (words, words.numel(), skip, chunk, sums, sums.numel(), state)
    _run("decode", sums, *counted, lows, low, unused, step, out.numel(), m, limit, out, flags)
    return state


def _count(words: Tensor, skip: int) -> tuple[int, Tensor, Tensor]:
    """(words of a chunk, ones in each but for the first ``skip`` bits of all, what decoding is to leave word in)."""
    chunk, sums = _chunks(words.numel(), words)
    state = sums.new_empty(STATE)
    _run("count_ones", sums, words, words.numel(), skip, chunk, sums, sums.numel(), state)
    return chunk, sums, state


def _chunks(count: int, like: Tensor) -> tuple[int, Tensor]:
    """(length of a chunk, room for the sum of each) of a list of 1 or more."""
    chunk = THREADS * -(-count // (THREADS * CHUNKS))
    return chunk, torch.empty(-(-count // chunk), dtype=torch.int64, device=like.device)


def _run(kernel: str, sums: Tensor, *arguments: Tensor | int | None) -> None:
    """A kernel with a block for each chunk."""
    run("code", kernel, THREADS * sums.numel(), sums, *arguments)
