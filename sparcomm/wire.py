"""Numbers that both ends of a message must agree on: header, status bits, and sizes of coded indices.

Everything here is a function of sizes only, so that a receiver knows each message's length, or with Golomb-Rice
indices an upper bound of it, before it arrives. Lengths are in 4-byte words. ``docs/wire-format.md`` shows the layout
byte by byte.
"""

from __future__ import annotations

import functools

WORD = 4  # bytes
HEADER_WORDS = 4  # 16 bytes before every payload
MAGIC = 0x5C

NONFINITE = 1  # status bit: an inf or NaN was seen by someone whose data is in here
DAMAGED = 2  # status bit: bytes that arrived were not what was sent

GROUP = 32  # int8 values that share a scale
SCALE_BIAS = (
    134  # an int8 value is code * 2^(scale - 134): from below float32's smallest subnormal to its largest value
)

RICE_HEADER = 6  # bits that say how many low bits of each gap are stored as they are

BINS = 2048  # magnitude histogram: the top 11 bits below the sign bit


def words(bits: int) -> int:
    """Words that hold ``bits`` bits."""
    return -(-bits // 32)


@functools.lru_cache(maxsize=4096)
def low_bits(k: int, m: int) -> int:
    """Elias-Fano's split for k sorted indices below m: bits of each index that are stored as they are."""
    return min(range(max(1, m.bit_length())), key=lambda low: elias_fano_bits(k, m, low))


def elias_fano_bits(k: int, m: int, low: int) -> int:
    """Bits of k sorted indices below m with ``low`` verbatim bits each: k·low, and a unary bitmap of the rest."""
    return k * low + k + ((m - 1) >> low)


@functools.lru_cache(maxsize=4096)
def elias_fano_words(k: int, m: int) -> int:
    """Words of the Elias-Fano code of k sorted distinct indices below m (low part, then high part)."""
    low = low_bits(k, m)
    return words(k * low) + words(k + ((m - 1) >> low))


def bitmap_words(m: int) -> int:
    """Words of a bitmap over m positions."""
    return words(m)


def scales(k: int) -> int:
    """Scale bytes of k int8 values."""
    return -(-k // GROUP)


def rice_bits(k: int, unary: int, low: int) -> int:
    """Bits of the Golomb-Rice code of k gaps with ``low`` verbatim bits each, whose other bits sum up to ``unary``."""
    return RICE_HEADER + k * (low + 1) + unary


@functools.lru_cache(maxsize=4096)
def rice_words(k: int, m: int) -> int:
    """Words that the Golomb-Rice code of k sorted distinct indices below m takes at most.

    The gaps add up to m - k or less. The encoder picks the shortest code for the indices at hand, which is no longer
    than the best choice by (k, m) alone. Without low bits the code is a bitmap as far as the last index: m bits do.
    """
    if k in (0, m):
        return 0
    return words(min(rice_bits(k, (m - k) >> low, low) for low in range(m.bit_length())))
