"""Bitmaps and votes, 64 elements or a line of words at a time. Words are uint32.

A vote counts in planes: bit i of plane d is bit d of how many said yes at bit i of a word. Adding two rows to them is
one full adder and a carry that ripples through as many planes as the number of votes so far needs, for 32 positions in
each operation on words, and for as many words as the processor's vectors hold.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm.kernels.cpu._jit import jit, negative, ones, reaching, span, trailing_zeros, widen
from sparcomm.kernels.cpu._quantize import noise

LINE = 256  # words of a row that are counted at once: with their planes they stay in the nearest cache
POSITIVE, NEGATIVE, ALTERNATE = 0, 1, 2
SUM = 1 << 18  # elements that are added up on their own, whoever does it: sums do not depend on threads
LANES = 64  # numbers that are added side by side, so that additions do not wait for each other

U = np.uint64
W = np.uint32
ALL = np.uint32(0xFFFFFFFF)
ALL64 = np.uint64(0xFFFFFFFFFFFFFFFF)


@jit
def store(out: Any, group: int, word: Any) -> None:
    """Writes 64 bits, or as many of them as ``out`` has room for."""
    out[2 * group] = W(word & U(0xFFFFFFFF))
    if 2 * group + 1 < out.size:
        out[2 * group + 1] = W(word >> U(32))


@jit
def tail(bits: Any) -> Any:
    """The elements after the last 64 whole ones, and zeros up to 64."""
    last = np.zeros(64, bits.dtype)
    start = bits.size // 64 * 64
    for i in range(start, bits.size):
        last[i - start] = bits[i]
    return last


@jit
def filled(bits: Any, out: Any) -> None:
    """Which elements, seen as signed integers, are not zero apart from their sign."""
    one = bits.dtype.type(1)
    for group in range(bits.size // 64):
        store(out, group, reaching(bits, 64 * group, one))
    if bits.size % 64:
        store(out, bits.size // 64, reaching(tail(bits), 0, one))


@jit
def unpack(words: Any, out: Any) -> None:
    """out: bool."""
    for w in range(out.size // 32):
        spread_word(words[w], span(out, 32 * w, 32))
    if out.size % 32:
        spread_word(words[out.size // 32], span(out, out.size // 32 * 32, out.size % 32))


@jit
def spread_word(word: Any, out: Any) -> None:
    """The lowest bits of a word."""
    for j in range(out.size):
        out[j] = (word >> W(j)) & W(1)


@jit
def support(bits: Any, width: int, magnitude: Any, out: Any) -> None:
    """Which keys hold an element that is not zero apart from its sign; magnitude: all other bits."""
    keys = (bits.size + width - 1) // width
    for w in range(out.size):
        word = W(0)
        for j in range(32 * w, min(32 * w + 32, keys)):
            found = bits.dtype.type(0)
            part = span(bits, j * width, min(width, bits.size - j * width))
            for i in range(part.size):
                found |= part[i]
            word |= W(found & magnitude != 0) << W(j & 31)
        out[w] = word


@jit
def support_narrow(bits: Any, width: int, out: Any) -> None:
    """The same for a width that divides 64 and is less."""
    one, keys, mask = bits.dtype.type(1), 64 // width, (U(1) << U(width)) - U(1)
    out[:] = 0
    for group in range((bits.size + 63) // 64):
        whole = 64 * group + 64 <= bits.size
        some = reaching(bits, 64 * group, one) if whole else reaching(tail(bits), 0, one)
        found = U(0)
        for j in range(keys):
            found |= U((some >> U(j * width)) & mask != U(0)) << U(j)
        first = group * keys
        if keys <= 32:
            out[first >> 5] |= W(found) << W(first & 31)
        else:
            store(out, group, found)


@jit
def popcount(words: Any) -> int:
    """Ones in all words."""
    count = 0
    for i in range(words.size):
        count += ones(U(words[i]))
    return count


@jit
def prefix(words: Any, out: Any) -> None:
    """Ones before each word."""
    count = 0
    for i in range(words.size):
        out[i] = count
        count += ones(U(words[i]))


@jit
def positions(words: Any, out: Any) -> None:
    """The first out.size ones, as many as there are."""
    found = 0
    for w in range(words.size):
        word = U(words[w])
        while word and found < out.size:
            out[found] = 32 * w + trailing_zeros(word)
            word &= word - U(1)
            found += 1


@jit
def rank(words: Any, prefix: Any, index: Any, out: Any) -> None:
    """Ones before each position."""
    for i in range(index.size):
        at = min(max(index[i] >> 5, 0), words.size - 1)
        below = min(max(index[i] - 32 * at, 0), 32)
        out[i] = prefix[at] + ones(U(words[at]) & ((U(1) << U(below)) - U(1)))


@jit
def unite(rows: Any, stride: int, count: int, start: int, out: Any) -> None:
    """The OR of so many rows, which lie ``stride`` words apart, from their word ``start`` on."""
    united = np.empty(LINE, np.uint32)
    for at in range(0, out.size, LINE):
        size = min(LINE, out.size - at)
        line = span(united, 0, size)
        line[:] = 0
        for r in range(count):
            row = span(rows, r * stride + start + at, size)
            for j in range(line.size):
                line[j] |= row[j]
        out[at : at + size] = line


@jit
def decided(rule: int, place: Any, key: Any) -> Any:
    """What the rule says at the 32 positions of word ``place``."""
    if rule == ALTERNATE:
        return noise(place, key)
    return ALL if rule == NEGATIVE else W(0)


@jit
def sign_bits(minus: Any, some: Any, rule: int, key: Any, place: Any) -> Any:
    """The signs of 64 elements, of which ``some`` are not zero, from word ``place`` on."""
    signs = minus & some
    if some != ALL64:
        low, high = decided(rule, place, key), decided(rule, W(place + W(1)), key)
        signs |= (U(low) | U(high) << U(32)) & ~some
    return signs


@jit
def pack_signs(bits: Any, infinite: Any, rule: int, key: Any, first: Any, out: Any, present: Any) -> bool:
    """Signs of elements as signed integers, and which are not zero if ``present`` is not None (then rule: POSITIVE).

    infinite: the bits of inf. Whether any element is inf or NaN.
    """
    one, bad = bits.dtype.type(1), U(0)
    for group in range(bits.size // 64):
        at = 64 * group
        some = reaching(bits, at, one)
        bad |= reaching(bits, at, infinite)
        store(out, group, sign_bits(negative(bits, at), some, rule, key, W(first + W(2 * group))))
        if present is not None:
            store(present, group, some)
    left = bits.size % 64
    if left:
        group, last = bits.size // 64, tail(bits)
        some = reaching(last, 0, one)
        bad |= reaching(last, 0, infinite)
        signs = sign_bits(negative(last, 0), some, rule, key, W(first + W(2 * group)))
        store(out, group, signs & ((U(1) << U(left)) - U(1)))
        if present is not None:
            store(present, group, some)
    return bad != U(0)


@jit
def add_rows(planes: Any, depth: int, a: Any, b: Any, carry: Any) -> None:
    """Adds a line of each of two rows to the planes, of which sums so far, these included, fill ``depth``."""
    plane, carried = span(planes, 0, a.size), span(carry, 0, a.size)
    for j in range(a.size):
        half = plane[j] ^ a[j]
        carried[j] = (plane[j] & a[j]) | (half & b[j])
        plane[j] = half ^ b[j]
    ripple(planes, depth, carried)


@jit
def add_votes(planes: Any, depth: int, row: Any, may: Any, carry: Any, voted: Any) -> None:
    """Adds a line of a row of which only some vote: 2 for yes, 1 for no vote, 0 for no."""
    plane, carried, anybody = span(planes, 0, row.size), span(carry, 0, row.size), span(voted, 0, row.size)
    for j in range(row.size):
        a, b = row[j] & may[j], row[j] | ~may[j]
        half = plane[j] ^ a
        carried[j] = (plane[j] & a) | (half & b)
        plane[j] = half ^ b
        anybody[j] |= may[j]
    ripple(planes, depth, carried)


@jit
def ripple(planes: Any, depth: int, carried: Any) -> None:
    """Adds a carry to the planes from the second on."""
    for d in range(1, depth):
        plane = span(planes, d * LINE, carried.size)
        for j in range(carried.size):
            both = plane[j] & carried[j]
            plane[j] ^= carried[j]
            carried[j] = both


@jit
def compare(planes: Any, depth: int, threshold: int, more: Any, tie: Any) -> None:
    """Where the numbers in the planes are more than ``threshold``, and where they are equal to it."""
    more[:] = 0
    tie[:] = ALL
    for d in range(depth - 1, -1, -1):
        plane = span(planes, d * LINE, more.size)
        if threshold >> d & 1:
            for j in range(more.size):
                tie[j] &= plane[j]
        else:
            for j in range(more.size):
                more[j] |= tie[j] & plane[j]
                tie[j] &= ~plane[j]


@jit
def bit_length(number: int) -> int:
    """Of a number of 0 or more."""
    length = 0
    while number >> length:
        length += 1
    return length


@jit
def vote(rows: Any, stride: int, count: int, start: int, rule: int, key: Any, first: Any, out: Any) -> None:
    """What most of so many rows say, which lie ``stride`` words apart, from their word ``start`` on."""
    depth = bit_length(count)
    planes = np.empty(depth * LINE, np.uint32)
    carry = np.empty(LINE, np.uint32)
    more = np.empty(LINE, np.uint32)
    tie = np.empty(LINE, np.uint32)
    zeros = np.zeros(LINE, np.uint32)
    for at in range(0, out.size, LINE):
        size = min(LINE, out.size - at)
        planes[:] = 0
        for r in range(0, count, 2):
            a = span(rows, r * stride + start + at, size)
            b = span(rows, (r + 1) * stride + start + at, size) if r + 1 < count else span(zeros, 0, size)
            add_rows(planes, bit_length(min(r + 2, count)), a, b, carry)
        yes, even = span(more, 0, size), span(tie, 0, size)
        compare(planes, depth, count // 2, yes, even)
        target = span(out, at, size)
        if count & 1:
            target[:] = yes
        else:
            for j in range(size):
                target[j] = yes[j] | (even[j] & decided(rule, W(first + W(at + j)), key))


@jit
def vote_present(
    rows: Any, stride: int, may: Any, may_stride: int, count: int, start: int, rule: int, key: Any, first: Any,
    out: Any, voted: Any,
) -> None:  # fmt: skip
    """The same where only those vote whose bit is set in their row of ``may``; voted: the OR of these."""
    depth = bit_length(2 * count)
    planes = np.empty(depth * LINE, np.uint32)
    carry = np.empty(LINE, np.uint32)
    more = np.empty(LINE, np.uint32)
    tie = np.empty(LINE, np.uint32)
    anybody = np.empty(LINE, np.uint32)
    for at in range(0, out.size, LINE):
        size = min(LINE, out.size - at)
        planes[:] = 0
        anybody[:] = 0
        for r in range(count):
            row = span(rows, r * stride + start + at, size)
            add_votes(planes, bit_length(2 * r + 2), row, span(may, r * may_stride + start + at, size), carry, anybody)
        yes, even = span(more, 0, size), span(tie, 0, size)
        compare(planes, depth, count, yes, even)
        for j in range(size):
            verdict = yes[j] | (even[j] & decided(rule, W(first + W(at + j)), key))
            out[at + j] = verdict & anybody[j]
        voted[at : at + size] = anybody[:size]


@jit
def line_of_signs(word: Any, may: Any, scale: Any, minus: Any, out: Any, adding: bool) -> None:
    """Numbers for the signs in the lowest bits of a word."""
    for j in range(out.size):
        value = minus if (word >> W(j)) & W(1) else scale
        value = value if (may >> W(j)) & W(1) else out.dtype.type(0)
        out[j] = out[j] + value if adding else value


@jit
def signs(words: Any, present: Any, scale: Any, minus: Any, out: Any, adding: bool) -> None:
    """Writes numbers for signs, or adds them; minus: -scale."""
    for w in range(words.size):
        may = ALL if present is None else present[w]
        if 32 * w + 32 <= out.size:
            line_of_signs(words[w], may, scale, minus, span(out, 32 * w, 32), adding)
        else:
            line_of_signs(words[w], may, scale, minus, span(out, 32 * w, out.size - 32 * w), adding)


@jit
def absolute_sums(x: Any, out: Any) -> None:
    """The sum of magnitudes of every SUM elements, float64."""
    lanes = np.empty(LANES, np.float64)
    for i in range(out.size):
        part = span(x, i * SUM, min(SUM, x.size - i * SUM))
        lanes[:] = 0
        for start in range(0, part.size // LANES * LANES, LANES):
            some = span(part, start, LANES)
            for j in range(LANES):
                lanes[j] += np.float64(abs(widen(some[j])))
        for j in range(part.size // LANES * LANES, part.size):
            lanes[j % LANES] += np.float64(abs(widen(part[j])))
        total = 0.0
        for j in range(LANES):
            total += lanes[j]
        out[i] = total
