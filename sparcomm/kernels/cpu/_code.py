"""Bits on the wire: Elias-Fano and bitmap codes of sorted indices, narrow values, the checksum.

Words are uint32. Decoders trust nothing: every access is bounded by sizes, not by what the words say.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._jit import bits_of, float_of, jit, load64, trailing_zeros, widen

DAMAGED = wire.DAMAGED

U = np.uint64
W = np.uint32


@jit
def increasing(index: Any, m: int) -> bool:
    """Whether ``index`` is strictly increasing, from 0 to below m."""
    good = index.size == 0 or (index[0] >= 0 and index[-1] < m)
    for i in range(1, index.size):
        good &= index[i] > index[i - 1]
    return good


@jit
def mark(out: Any, bit: int) -> None:
    """Sets a bit."""
    out[bit >> 5] |= W(1) << W(bit & 31)


@jit
def pack(values: Any, low: int, out: Any, start: int) -> None:
    """Writes the ``low`` lowest bits of each value, one after the other, from bit ``start`` (below 32) on.

    What lies below ``start`` stays; the rest of the last word becomes zero.
    """
    pending, filled, at = U(out[0]) if start else U(0), start, 0
    if low <= 32:
        mask = (U(1) << U(low)) - U(1)
        for i in range(values.size):
            pending |= (U(values[i]) & mask) << U(filled)
            filled += low
            if filled >= 32:
                out[at] = W(pending & U(0xFFFFFFFF))
                at += 1
                pending >>= U(32)
                filled -= 32
    else:  # in two parts, so that 64 bits always hold what is pending
        for i in range(values.size):
            left, rest = low, U(values[i])
            while left > 0:
                width = min(left, 32)
                pending |= (rest & ((U(1) << U(width)) - U(1))) << U(filled)
                filled += width
                if filled >= 32:
                    out[at] = W(pending & U(0xFFFFFFFF))
                    at += 1
                    pending >>= U(32)
                    filled -= 32
                rest >>= U(width)
                left -= width
    if filled:
        out[at] = W(pending)


@jit
def read(words: Any, start: int, width: int) -> Any:
    """``width`` (0 to 63) bits from bit ``start`` on, all inside ``words``."""
    value, got = U(0), 0
    while got < width:
        bit = (start + got) & 31
        take = min(32 - bit, width - got)
        part = (U(words[(start + got) >> 5]) >> U(bit)) & ((U(1) << U(take)) - U(1))
        value |= part << U(got)
        got += take
    return value


@jit
def field(words: Any, start: int, width: int) -> Any:
    """As ``read``, by one load where two words are there that hold all of it."""
    at = start >> 5
    if width <= 32 and at + 1 < words.size:
        return (load64(words, at) >> U(start & 31)) & ((U(1) << U(width)) - U(1))
    return read(words, start, width)


@jit
def give_up(out: Any, flags: Any) -> None:
    """Indices that harm nobody, instead of what does not decode."""
    for i in range(out.size):
        out[i] = i
    flags[0] |= DAMAGED


@jit
def elias_fano_encode(index: Any, m: int, low: int, out: Any) -> bool:
    """Writes low parts, then the unary bitmap. False, and nothing is written, unless index increases below m."""
    if not increasing(index, m):
        return False
    out[:] = 0
    pack(index, low, out, 0)
    at = 32 * ((index.size * low + 31) // 32)
    for i in range(index.size):
        mark(out, at + (index[i] >> low) + i)
    return True


@jit
def elias_fano_decode(words: Any, k: int, m: int, low: int, out: Any, flags: Any) -> None:
    """Reads k = out.size indices; 0, 1, ... if words is not what elias_fano_encode writes."""
    high = (k * low + 31) // 32
    limit = max(0, k + ((m - 1) >> low))
    found = 0
    previous = np.int64(-1)
    good = high == 0 or read(words, k * low, 32 * high - k * low) == U(0)
    for w in range(high, words.size):
        word = U(words[w])
        while word:
            one = 32 * (w - high) + trailing_zeros(word)
            word &= word - U(1)
            if found >= k or one >= limit:
                give_up(out, flags)
                return
            value = ((one - found) << low) | np.int64(field(words, found * low, low))
            good &= value > previous
            previous = value
            out[found] = value
            found += 1
    if not good or found < k or previous >= m:
        give_up(out, flags)


@jit
def bitmap_encode(index: Any, m: int, out: Any) -> bool:
    """Sets one bit per index. False, and nothing is written, unless index increases below m."""
    if not increasing(index, m):
        return False
    out[:] = 0
    for i in range(index.size):
        mark(out, index[i])
    return True


@jit
def bitmap_decode(words: Any, m: int, out: Any, flags: Any) -> None:
    """Reads out.size indices; 0, 1, ... if words is not what bitmap_encode writes."""
    found = 0
    for w in range(words.size):
        word = U(words[w])
        while word:
            one = 32 * w + trailing_zeros(word)
            word &= word - U(1)
            if found >= out.size or one >= m:
                give_up(out, flags)
                return
            out[found] = one
            found += 1
    if found < out.size:
        give_up(out, flags)


@jit
def to_float32(value: Any) -> Any:
    """Rounds to nearest even; finite values saturate."""
    single = np.float32(value)
    if np.isinf(single) and np.isfinite(value):
        single = float_of(W(0x7F7FFFFF)) if value > 0 else float_of(W(0xFF7FFFFF))
    return single


@jit
def narrow_float32(value: Any, out: Any, decoded: Any) -> None:
    """out: float32."""
    for i in range(value.size):
        out[i] = to_float32(value[i])
        decoded[i] = out[i]


@jit
def narrow_bfloat16(value: Any, out: Any, decoded: Any) -> None:
    """out: bfloat16 as uint16."""
    for i in range(value.size):
        bits = bits_of(to_float32(value[i]))
        f = bits & W(0x7FFFFFFF)
        if f > W(0x7F800000):
            short = W(0x7FC0)
        elif f == W(0x7F800000):
            short = W(0x7F80)
        else:
            short = min(W((f + W(0x7FFF) + ((f >> W(16)) & W(1))) >> W(16)), W(0x7F7F))
        out[i] = short | ((bits >> W(16)) & W(0x8000))
        decoded[i] = widen(out[i])


@jit
def narrow_float16(value: Any, out: Any, decoded: Any) -> None:
    """out: float16 as int16."""
    half = float_of(W(126 << 23))  # 0.5, whose last bit weighs as much as float16's smallest subnormal
    for i in range(value.size):
        bits = bits_of(to_float32(value[i]))
        f = W(bits & W(0x7FFFFFFF))
        if f > W(0x7F800000):
            short = W(0x7E00)
        elif f == W(0x7F800000):
            short = W(0x7C00)
        elif f >= W(0x477FF000):  # 65520, which would round to infinity
            short = W(0x7BFF)
        elif f < W(113 << 23):  # subnormal as float16: the addition rounds
            short = W(bits_of(float_of(f) + half) - W(126 << 23))
        else:
            short = W((f - W(112 << 23) + W(0xFFF) + ((f >> W(13)) & W(1))) >> W(13))
        out[i] = np.int16(short | ((bits >> W(16)) & W(0x8000)))
        decoded[i] = widen(out[i])


@jit
def mix(word: Any) -> Any:
    """A bijection of 32-bit words in which every input bit reaches every output bit."""
    word = W(W(word ^ (word >> W(16))) * W(0x7FEB352D))
    word = W(W(word ^ (word >> W(15))) * W(0x846CA68B))
    return W(word ^ (word >> W(16)))


@jit
def checksum(words: Any) -> Any:
    """Sum of mixed words, with word 3 taken as 0."""
    total = W(0)
    for i in range(words.size):
        total = W(total + mix(W(words[i] ^ W(W(i) * W(0x9E3779B9)))))
    place = W(3 * 0x9E3779B9 & 0xFFFFFFFF)
    return W(total - mix(W(words[3] ^ place)) + mix(place))
